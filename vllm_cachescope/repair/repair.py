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


def earliest(repairs: tuple[Repair, ...]) -> Repair:
    """Return the repair that stands first in the prompt: without it nothing behind it is read."""
    return min(repairs, key=lambda repair: _place(repair.path))


def _place(path: str) -> tuple[int, int]:
    name, _, rest = path.partition("[")
    digits = rest.partition("]")[0]
    index = int(digits) if digits.isdecimal() else 0
    return (_REGIONS.get(name, 3 if index else 2), index)


# A template's parameters come first; `messages[0]` is a system prompt or stands right behind it.
_REGIONS = {"chat_template_kwargs": 0, "tools": 1, "system": 2, "instructions": 2}
