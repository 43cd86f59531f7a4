"""The sessions of a recording: their calls, packed."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_cachescope.cli.report.phases import Phase, PhaseCall, find_phases

_ROW = struct.Struct("<IdIIIIIHHB")
_COMPACTED, _BREAK = 1, 2


@dataclass(frozen=True, slots=True)
class SessionCall:
    """One call of a session.

    Attributes:
        number: its number in the recording, from 0.
        at: when it was sent, in seconds.
        tokens: tokens of its prompt.
        shared: how many of them an earlier call had, from the first on.
        read: how many a cache reads that is used as recorded.
        missed: tokens that a break cost.
        lineage: number of its lineage in the session.
        agent, model: numbers of its agent and model in the recording.
        compacted: whether it goes on from a summary.
        is_break: whether a prefix broke at it.
    """

    number: int
    at: float
    tokens: int
    shared: int
    read: int
    missed: int
    lineage: int
    agent: int
    model: int
    compacted: bool
    is_break: bool


@dataclass(slots=True)
class Lineage:
    """The sums of one lineage.

    Attributes:
        number: its number in the session, from 1.
        agent: number of the agent that began it.
        calls, tokens, shared: its calls, the tokens of their prompts, and how many of them earlier
            calls had.
        breaks, missed: its breaks, and the tokens that they cost.
    """

    number: int
    agent: int
    calls: int = 0
    tokens: int = 0
    shared: int = 0
    breaks: int = 0
    missed: int = 0


@dataclass(slots=True)
class Session:
    """A session's calls, at 37 bytes each.

    Attributes:
        number: its number in the recording, from 0.
        name: its id, or its file where its calls name no session.
        tokens: tokens of all its prompts.
    """

    number: int
    name: str
    tokens: int = 0
    _packed: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self._packed) // _ROW.size

    def add(self, call: SessionCall) -> None:
        """Add the next call."""
        flags = _COMPACTED * call.compacted | _BREAK * call.is_break
        counts = call.tokens, call.shared, call.read, call.missed, call.lineage
        self._packed += _ROW.pack(call.number, call.at, *counts, call.agent, call.model, flags)
        self.tokens += call.tokens

    def __iter__(self) -> Iterator[SessionCall]:
        for row in _ROW.iter_unpack(self._packed):
            number, at, tokens, shared, read, missed, lineage, agent, model, flags = row
            yield SessionCall(
                number,
                at,
                tokens,
                shared,
                read,
                missed,
                lineage,
                agent,
                model,
                bool(flags & _COMPACTED),
                bool(flags & _BREAK),
            )

    def phases(self) -> list[Phase]:
        """Return its phases."""
        return find_phases(
            [
                PhaseCall(call.tokens, call.shared, call.agent, call.model, call.at, call.compacted)
                for call in self
            ]
        )

    def lineages(self) -> list[Lineage]:
        """Return the sums of its lineages, by number."""
        found: dict[int, Lineage] = {}
        for call in self:
            one = found.setdefault(call.lineage, Lineage(call.lineage, call.agent))
            one.calls += 1
            one.tokens += call.tokens
            one.shared += call.shared
            one.breaks += call.is_break
            one.missed += call.missed
        return [found[number] for number in sorted(found)]
