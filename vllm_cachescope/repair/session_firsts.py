"""The firsts of a session: what replicas tell each other of what came first in it.

They are names of tools, values of parameters that are no text, how first spellings are arranged,
and the numbers of first heads. The texts themselves stay where they were said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from vllm_cachescope.repair.spelling import unpacked

K = TypeVar("K", bytes, str)

MAX_TOOLS, MAX_VALUES = 256, 64
"""How many of each are told, the first."""

MAX_ARRANGEMENTS, MAX_HEADS = 512, 16
"""How many arrangements of spellings are told, and of heads; the first."""

MAX_ARRANGED = 16 * 2**10
"""Bytes of all arrangements with their keys, and as many of heads."""

MAX_NAMES = 16 * 2**10
"""Characters of all names together."""


@dataclass(frozen=True, slots=True)
class SessionFirsts:
    """What came first in a session.

    Attributes:
        tools: the tools' identities, in the order in which they came.
        values: the first values of parameters, packed, by their paths.
        arrangements: as `SessionState.arrangements`.
        heads: by what they are of, what `numbers_of` says of first heads.
    """

    tools: Sequence[str] = ()
    values: Mapping[str, bytes] = field(default_factory=dict)
    arrangements: Mapping[bytes, bytes] = field(default_factory=dict)
    heads: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        told = (*self.arrangements.values(), *self.heads.values())
        entries = len(self.tools) + 2 * len(self.values) + 2 * len(told)
        return sum(map(len, (*self.tools, *told))) + 60 * entries


def told_firsts(
    tools: Sequence[str],
    values: Mapping[str, bytes],
    arrangements: Mapping[bytes, bytes] = MappingProxyType({}),
    heads: Mapping[str, bytes] = MappingProxyType({}),
) -> SessionFirsts:
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
    return SessionFirsts(
        tuple(names), told, _first(arrangements, MAX_ARRANGEMENTS), _first(heads, MAX_HEADS)
    )


def _first(found: Mapping[K, bytes], count: int) -> dict[K, bytes]:
    room, told = MAX_ARRANGED, {}
    for key, value in list(found.items())[:count]:
        room -= len(key) + len(value)
        if room < 0:
            break
        told[key] = value
    return told


def _is_no_text(value: bytes) -> bool:
    """Whether a packed value is absence, null, a truth value or a number."""
    if not value:
        return True
    try:
        return isinstance(unpacked(value), int | float | None)
    except ValueError:
        return False
