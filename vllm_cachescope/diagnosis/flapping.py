"""Fields that keep changing: a flag that goes back and forth, a value that is new every time."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cachetools import LRUCache

from vllm_cachescope.diagnosis.changes import Change, ChangeKind

_MAX_FIELDS = 64
_MAX_VALUES = 8

TOLD_FIELDS = 16
"""Fields of a lineage that replicas tell each other of, those that changed most."""

_TOLD_NAME = 256
"""Characters of a name that they tell: clients choose what fields are called."""


@dataclass(frozen=True, slots=True)
class FlappingField:
    """A field that has changed more than once in one lineage.

    Attributes:
        field: its path or name.
        flips: how often it changed.
        tokens_lost: estimated tokens that could not be reused because of it, in all.
        returns: whether it came back to an earlier value, as a flag does that goes back and forth.
            False where its value was new each time, as a nonce is.
    """

    field: str
    flips: int
    tokens_lost: int
    returns: bool


@dataclass(frozen=True, slots=True)
class FieldChanges:
    """The changes of a field in one lineage so far.

    Attributes:
        field, flips, tokens_lost, returns: as `FlappingField` has them.
        values: hashes of its latest values, the latest last.
    """

    field: str
    values: tuple[bytes, ...] = ()
    flips: int = 0
    tokens_lost: int = 0
    returns: bool = False


class FlappingFields:
    """Counts the changes of each field in a session's lineages, of the 64 that changed last."""

    def __init__(self) -> None:
        self._fields: LRUCache[tuple[int, str], FieldChanges] = LRUCache(_MAX_FIELDS)

    def note(self, lineage: int, change: Change, tokens_lost: int) -> FlappingField | None:
        """Count a change.

        Args:
            lineage: the lineage it happened in.
            change: what changed.
            tokens_lost: estimated tokens that could not be reused because of it.

        Returns:
            The field that changed, from its second change on; None at its first.
        """
        name = _name(change)
        before = self._fields.get((lineage, name), FieldChanges(name, (change.old_value,)))
        found = self._fields[lineage, name] = replace(
            before,
            values=(*before.values, change.value)[-_MAX_VALUES:],
            flips=before.flips + 1,
            tokens_lost=before.tokens_lost + tokens_lost,
            returns=before.returns or change.value in before.values,
        )
        if found.flips < 2:
            return None
        return FlappingField(name, found.flips, found.tokens_lost, found.returns)

    def of(self, lineage: int) -> tuple[FieldChanges, ...]:
        """Return what other replicas are to know of a lineage."""
        mine = [self._fields[key] for key in list(self._fields) if key[0] == lineage]
        told = [one for one in mine if len(one.field) <= _TOLD_NAME]
        return tuple(sorted(told, key=lambda one: -one.flips)[:TOLD_FIELDS])

    def merge(self, lineage: int, told: Iterable[FieldChanges]) -> None:
        """Take in what another replica knows of a lineage. Its counts go on from those here, or
        the other way round: the higher one has both."""
        for one in told:
            here = self._fields.get((lineage, one.field))
            if here is None or here.flips < one.flips:
                self._fields[lineage, one.field] = one


def _name(change: Change) -> str:
    """Return a name of what changed that is the same when it changes back."""
    kind = change.kind
    if kind is ChangeKind.TOOLS_REORDERED:
        return "tools"
    if change.area == "tools":
        return "tools." + ",".join(change.names[:4])
    return change.path
