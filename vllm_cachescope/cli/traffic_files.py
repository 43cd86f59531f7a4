"""The files of recorded traffic that a command line names."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from vllm_cachescope.cli.traffic import BlockCall, Call, TrafficError, read_traffic

Traffic = list[Call] | list[BlockCall]
"""The calls in one file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files of recorded requests that a command reads, which `read` reads."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON lines of request bodies, of envelopes around them, or of a text or block trace; "
        ".gz is unpacked; - is standard input",
    )
    parser.add_argument(
        "--allow-empty", action="store_true", help="let a file without a request be no error"
    )


def read(args: argparse.Namespace) -> Iterator[tuple[Path, Traffic]]:
    """Yield each of the files that the parsed arguments name, with its calls.

    Raises:
        OSError: if a file cannot be read.
        TrafficError: on a line that cannot be understood, or a file without a request.
    """
    for path in args.files:
        calls = read_traffic(path)
        if not calls and not args.allow_empty:
            raise TrafficError(f"{path}: holds no request; --allow-empty lets that be no error")
        yield path, calls
