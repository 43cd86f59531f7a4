"""Fields that keep changing: a flag that goes back and forth, a value that is new every time."""

from collections import OrderedDict
from dataclasses import dataclass, field

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
        returns: whether it came back to a value it had before: it flaps. Otherwise it is new each
            time, as a nonce is.
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
    """Counts the changes of each field in a session's lineages, the latest 64 fields."""

    def __init__(self) -> None:
        self._fields: OrderedDict[tuple[int, str], _Field] = OrderedDict()

    def note(self, lineage: int, change: Change, tokens_lost: int) -> FlappingField | None:
        """Count a change; return the field's latch once it has changed twice.

        Args:
            lineage: the lineage it happened in.
            change: what changed.
            tokens_lost: estimated tokens that could not be reused because of it.
        """
        name = _name(change)
        found = self._fields.setdefault((lineage, name), _Field())
        self._fields.move_to_end((lineage, name))
        if len(self._fields) > _MAX_FIELDS:
            self._fields.popitem(last=False)
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
    """Name the field that ``change`` is about, the same for its way there and its way back."""
    kind = change.kind
    if kind is ChangeKind.TOOLS_REORDERED:
        return "tools"
    if change.area == "tools":
        return "tools." + ",".join(change.names[:4])
    return change.path
