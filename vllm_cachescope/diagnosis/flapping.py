"""Fields that keep changing: a flag that goes back and forth, a value that is new every time."""

from dataclasses import dataclass, field

from cachetools import LRUCache

from vllm_cachescope.diagnosis.changes import Change, ChangeKind

_MAX_FIELDS = 64
_MAX_VALUES = 8


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


@dataclass(slots=True)
class _Field:
    values: list[bytes] = field(default_factory=list)
    flips: int = 0
    tokens_lost: int = 0
    returns: bool = False


class FlappingFields:
    """Counts the changes of each field in a session's lineages, of the 64 that changed last."""

    def __init__(self) -> None:
        self._fields: LRUCache[tuple[int, str], _Field] = LRUCache(_MAX_FIELDS)

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
        found = self._fields.setdefault((lineage, name), _Field())
        if not found.values:
            found.values.append(change.old_value)
        found.returns |= change.value in found.values
        found.values = [*found.values, change.value][-_MAX_VALUES:]
        found.flips += 1
        found.tokens_lost += tokens_lost
        if found.flips < 2:
            return None
        return FlappingField(name, found.flips, found.tokens_lost, found.returns)


def _name(change: Change) -> str:
    """Return a name of what changed that is the same when it changes back."""
    kind = change.kind
    if kind is ChangeKind.TOOLS_REORDERED:
        return "tools"
    if change.area == "tools":
        return "tools." + ",".join(change.names[:4])
    return change.path
