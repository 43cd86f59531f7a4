"""The files of recorded traffic that a command line names."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_cachescope.cli.traffic import BlockCall, Call, LeftOut, TrafficError, read_traffic

Traffic = list[Call] | list[BlockCall]
"""The calls in one file."""

_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files of recorded requests that a command reads, which `TrafficFiles` reads."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="request bodies (Messages, Chat, Responses, Completions, Bedrock's Converse), by "
        "themselves or in envelopes: JSON lines, an array or a document; logs of LiteLLM and "
        "OpenRouter, HAR, mitmproxy's flows, OpenTelemetry spans, session files of Claude Code and "
        "Codex; text and block traces. .gz is unpacked; - is standard input",
    )
    parser.add_argument(
        "--allow-empty", action="store_true", help="let a file without a request be no error"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 2 if a line was left out, because it cannot be understood or its server "
        "refuses the request",
    )


class TrafficFiles:
    """The files that the parsed arguments name.

    Attributes:
        left_out: the lines that were left out of those read so far.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._files: list[Path] = args.files
        self._allow_empty: bool = args.allow_empty
        self._strict: bool = args.strict
        self.left_out: list[LeftOut] = []

    def read(self) -> Iterator[tuple[Path, Traffic]]:
        """Yield each of the files with its calls.

        Raises:
            OSError: if a file cannot be read.
            TrafficError: if nothing in a file can be understood, or it holds no request.
        """
        for path in self._files:
            before = len(self.left_out)
            calls = read_traffic(path, self.left_out)
            if not calls and not self._allow_empty and len(self.left_out) == before:
                raise TrafficError(f"{path}: holds no request; --allow-empty lets that be no error")
            yield path, calls

    @property
    def fails(self) -> bool:
        """Whether lines were left out that had to be read."""
        return self._strict and bool(self.left_out)

    def tell(self, command: str) -> None:
        """Say on standard error which lines were left out."""
        for one in self.left_out[:_SHOWN]:
            print(f"cachescope {command}: left out {one}", file=sys.stderr)
        if (more := len(self.left_out) - _SHOWN) > 0:
            print(f"cachescope {command}: and {more:,} more lines", file=sys.stderr)
