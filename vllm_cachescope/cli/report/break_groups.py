"""Breaks that have the same cause in the same place, counted together."""

import re
from dataclasses import dataclass

from vllm_cachescope.diagnosis.outcome import Diagnosis

_MAX_GROUPS = 1000
_INDEX = re.compile(r"(?<=[a-z])\[\d+\]|@\d+")


@dataclass(slots=True)
class BreakGroup:
    """Breaks alike.

    Attributes:
        cause: a `DiagnosisKind` or a `MissCause`.
        place: where they are in the clients' bodies, without the numbers of messages.
        suggestion: what to do about the first of them.
        expected: whether they are as they should be.
        source: file and line of the first.
        calls: how many.
        missed: the tokens that they cost.
    """

    cause: str
    place: str
    suggestion: str
    expected: bool
    source: str
    calls: int = 0
    missed: int = 0


class BreakGroups:
    """Counts breaks by cause and place.

    Attributes:
        calls: how many breaks there were, of all groups and of those that are not kept.
        missed: the tokens that they cost.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], BreakGroup] = {}
        self.calls = 0
        self.missed = 0

    def add(self, source: str, diagnosis: Diagnosis, missed: int) -> None:
        """Count a break.

        Args:
            source: file and line of the call.
            diagnosis: what is known of it.
            missed: the tokens that it cost.
        """
        self.calls += 1
        self.missed += missed
        path = diagnosis.where.path if diagnosis.where else ""
        place = _INDEX.sub("[…]", path) if path.startswith(("messages", "input")) else path
        names = diagnosis.names[:3]
        told = f"{place} ({', '.join(names)})" if names else place
        key = diagnosis.cause, told, diagnosis.expected
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= _MAX_GROUPS:
                return
            group = self._groups[key] = BreakGroup(
                str(diagnosis.cause), told, diagnosis.suggestion, diagnosis.expected, source
            )
        group.calls += 1
        group.missed += missed

    def groups(self) -> list[BreakGroup]:
        """Return the groups, those that cost most first."""
        return sorted(self._groups.values(), key=lambda group: (-group.missed, -group.calls))
