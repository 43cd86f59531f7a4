"""The recorded traces that benchmarks of policies take: ``--trace FILE``, several times."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import arguments
from vllm_cachescope.cli.simulate.traced_calls import traced
from vllm_cachescope.cli.traffic import BlockCall, read_traffic
from vllm_cachescope.simulation.traced_request import TracedRequest

TEXT_BLOCK = 128
"""Tokens of a block that texts are cut into."""


@dataclass(frozen=True, slots=True)
class RecordedTraces:
    """What was recorded.

    Attributes:
        blocks: the calls of traces that hold no texts but blocks' ids.
        texts: the requests of each other trace, cut into blocks of `TEXT_BLOCK` tokens.
    """

    blocks: list[BlockCall]
    texts: list[list[TracedRequest]]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "RecordedTraces":
        """Read traces.

        Args:
            paths: their files.
        """
        calls = [read_traffic(path) for path in paths]
        return cls(
            [call for one in calls for call in one if isinstance(call, BlockCall)],
            [
                traced(one, TEXT_BLOCK, None)
                for one in calls
                if one and not isinstance(one[0], BlockCall)
            ],
        )


def trace_arguments(
    description: str, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, RecordedTraces]:
    """Parse the arguments that all benchmarks take, and read the traces.

    Args:
        description: of the benchmark.
        argv: the arguments; None for the process's.
    """
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--trace", type=Path, action="append", default=[])
    traces, rest = own.parse_known_args(argv)
    sys.argv[1:] = rest
    return arguments(description), RecordedTraces.read(traces.trace)
