"""A cache marker, or a field of one, that a request was served without."""

from dataclasses import dataclass
from enum import StrEnum


class IgnoredReason(StrEnum):
    """Why a marker was ignored; the value is the label of the metric."""

    EMPTY = "empty"
    MISPLACED = "misplaced"
    TOO_MANY = "too_many"
    MALFORMED = "malformed"
    UNKNOWN_FIELD = "unknown_field"
    UNKNOWN_TTL = "unknown_ttl"
    LONGER_TTL = "longer_ttl"
    UNKNOWN_SCOPE = "unknown_scope"
    WIDER_SCOPE = "wider_scope"
    NOT_A_WRITER = "not_a_writer"
    TWO_DIALECTS = "two_dialects"
    OPTION = "option"

    @property
    def words(self) -> str:
        """What is wrong, and what was done instead, as a sentence without its subject."""
        return _WORDS[self]


_WORDS = {
    IgnoredReason.EMPTY: "stands on what has no text; ignored",
    IgnoredReason.MISPLACED: "stands where no marker may; ignored",
    IgnoredReason.TOO_MANY: "is followed by as many as count; ignored",
    IgnoredReason.MALFORMED: "is no marker of a known kind; ignored",
    IgnoredReason.UNKNOWN_FIELD: "is no field of a marker; ignored",
    IgnoredReason.UNKNOWN_TTL: "is no lifetime that the server allows; the default is used",
    IgnoredReason.LONGER_TTL: "is longer than an earlier lifetime; the earlier one is used",
    IgnoredReason.UNKNOWN_SCOPE: "is no scope; read as session",
    IgnoredReason.WIDER_SCOPE: "is wider than an earlier scope; the earlier one is used",
    IgnoredReason.NOT_A_WRITER: "is global, which only global_writers may write; read as org",
    IgnoredReason.TWO_DIALECTS: "stands beside cache_control; the narrower reading of both is used",
    IgnoredReason.OPTION: "is no value of this option; ignored",
}


@dataclass(frozen=True, slots=True)
class IgnoredMarker:
    """A marker, or a field of one, that does not count as it was written.

    Attributes:
        path: where it stands in the body, as in ``messages[3].cache_control.ttl``.
        reason: why it does not count.
    """

    path: str
    reason: IgnoredReason
