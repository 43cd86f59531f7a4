"""The firsts of a session: what replicas tell each other of what came first in it.

They are names of tools, and values of parameters that are no text. Spellings and heads are text of
the prompt, and stay where they were said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_cachescope.repair.spelling import unpacked

MAX_TOOLS, MAX_VALUES = 256, 64
"""How many of each are told, the first."""

MAX_NAMES = 16 * 2**10
"""Characters of all names together."""


@dataclass(frozen=True, slots=True)
class SessionFirsts:
    """What came first in a session.

    Attributes:
        tools: the tools' identities, in the order in which they came.
        values: the first values of parameters, packed, by their paths.
    """

    tools: Sequence[str] = ()
    values: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        return sum(map(len, self.tools)) + 60 * (len(self.tools) + 2 * len(self.values))


def told_firsts(tools: Sequence[str], values: Mapping[str, bytes]) -> SessionFirsts:
    """Return as much of what came first as may be told, and fits."""
    room, names = MAX_NAMES, []
    for name in tools[:MAX_TOOLS]:
        room -= len(name)
        if room < 0:
            break
        names.append(name)
    told: dict[str, bytes] = {}
    for path, value in values.items():
        if len(told) < MAX_VALUES and len(path) <= room and _is_no_text(value):
            room -= len(path)
            told[path] = value
    return SessionFirsts(tuple(names), told)


def _is_no_text(value: bytes) -> bool:
    """Whether a packed value is absence, null, a truth value or a number."""
    if not value:
        return True
    try:
        return isinstance(unpacked(value), int | float | None)
    except ValueError:
        return False
