"""Breaks by rule and place, counted as they come: what is kept does not grow with the traffic."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_cachescope.cli.findings.loss import Loss

_MAX_GROUPS = 1000


@dataclass(slots=True)
class BreakGroup:
    """The losses of one rule at one place.

    Attributes:
        loss: the first of them.
        source: file and line of the first.
        calls: how many calls have one.
        missed: the tokens that they cost.
    """

    loss: Loss
    source: str
    calls: int = 0
    missed: int = 0


class BreakGroups:
    """Counts losses by rule and place.

    Attributes:
        calls: how many calls had a loss, of all groups and of those that are not kept.
        missed: the tokens that they cost.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], BreakGroup] = {}
        self.calls = 0
        self.missed = 0

    def add(self, source: str, losses: Iterable[Loss]) -> None:
        """Count the losses of a call, at least one.

        Args:
            source: file and line of the call.
            losses: what it could have read and did not.
        """
        self.calls += 1
        for loss in losses:
            self.missed += loss.tokens
            key = loss.rule.code, loss.place
            group = self._groups.get(key)
            if group is None:
                if len(self._groups) >= _MAX_GROUPS:
                    continue
                group = self._groups[key] = BreakGroup(loss, source)
            group.calls += 1
            group.missed += loss.tokens

    def groups(self) -> list[BreakGroup]:
        """Return the groups, those that cost most first."""
        return sorted(self._groups.values(), key=lambda group: (-group.missed, -group.calls))
