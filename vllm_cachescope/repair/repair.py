"""A repair: what was put right in a request, and the kinds there are."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class RepairKind(StrEnum):
    """The kind of a repair, in the order in which prompts have what they put right."""

    FIELD = "latched_field"
    TOOLS = "tools_order"
    JSON = "json_form"
    HEAD = "volatile_head"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was put right of one kind.

    Attributes:
        kind: the kind.
        path: the first place in the client's body, as in ``tools[7]``.
        count: how many places there are.
        change: what would have broken the prefix, in words; empty where nothing would.
        saved_tokens: tokens that were read and would not have been; None while that is not known.
    """

    kind: RepairKind
    path: str
    count: int = 1
    change: str = ""
    saved_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON; what is not known is left out."""
        return {
            "kind": self.kind.value,
            "path": self.path,
            "count": self.count,
            **({"change": self.change} if self.change else {}),
            **({} if self.saved_tokens is None else {"saved_tokens": self.saved_tokens}),
        }


def earliest(repairs: tuple[Repair, ...], tools_behind_system: bool = False) -> Repair:
    """Return the repair that stands first in the prompt: without it nothing behind it is read.

    Args:
        repairs: the repairs.
        tools_behind_system: whether the prompt has its tools behind the system prompt.
    """

    def place(repair: Repair) -> tuple[int, int]:
        name, _, rest = repair.path.partition("[")
        if name == "tools" and tools_behind_system:
            return _BEHIND_SYSTEM
        digits = rest.partition("]")[0]
        index = int(digits) if digits.isdecimal() else 0
        if repair.kind is RepairKind.HEAD:
            return 2, index
        return (1 if name == "tools" else 0 if repair.kind is RepairKind.FIELD else 4, index)

    return min(repairs, key=place)


_BEHIND_SYSTEM = 3, 0
