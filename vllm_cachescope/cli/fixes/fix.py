"""A fix: one kind of correction at one place, which may be needed in many requests."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Fix:
    """A correction.

    Attributes:
        rule: the name of the rule that it mends; see `RULES`.
        place: where, as in ``tools.Bash`` or ``system[1]``.
        words: what is done there, in a sentence without a full stop.
        sources: files and lines of the requests that it changes.
        edits: make the corrections.
        saves: tokens that the traffic would have read more, once that is known.
    """

    rule: str
    place: str
    words: str
    sources: list[str] = field(default_factory=list)
    edits: list[Callable[[], object]] = field(default_factory=list)
    saves: int = 0

    def add(self, source: str, edit: Callable[[], object]) -> None:
        """Take a request that needs the correction."""
        if not self.sources or self.sources[-1] != source:
            self.sources.append(source)
        self.edits.append(edit)

    def apply(self) -> None:
        """Make all corrections."""
        for edit in self.edits:
            edit()
        self.edits.clear()


@dataclass(frozen=True, slots=True)
class LeftAsIs:
    """What was seen and not corrected.

    Attributes:
        source: file and line of the first request that has it.
        place: where.
        reason: why it was left.
    """

    source: str
    place: str
    reason: str
