"""The lines of recorded traffic that were left out: how many, and the first of them."""

from vllm_cachescope.cli.traffic import LeftOut

_KEPT = 5


class LeftOutLines(list[LeftOut]):
    """Takes lines that were left out, and keeps the first few.

    Attributes:
        total: how many it took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def append(self, line: LeftOut, /) -> None:
        """Take a line."""
        self.total += 1
        if len(self) < _KEPT:
            super().append(line)

    def __str__(self) -> str:
        """Say which they were, a line each; empty if there were none."""
        told = [f"left out {line}" for line in self]
        if (more := self.total - len(self)) > 0:
            told.append(f"and {more:,} more lines")
        return "\n".join(f"cachescope report: {line}" for line in told)
