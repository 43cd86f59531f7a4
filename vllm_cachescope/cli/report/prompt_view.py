"""A recorded prompt as a cache sees it: blocks, each known by all that stands before its end."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_cachescope.cli.traffic import BLOCK_TOKENS, BlockCall, Call
from vllm_cachescope.config import Config
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.parameters import ROUTING_PARAMS, is_front
from vllm_cachescope.diagnosis.part_kind import Trait
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.prompt.segments import RegionDefault, segments
from vllm_cachescope.tenancy.scope import Scope

_DEFAULT_TTL_S = 300


class Place(StrEnum):
    """A place in a prompt where a client can always put a breakpoint.

    Attributes:
        TOOLS: behind the last tool.
        SYSTEM: behind the system prompt.
        OPENING: behind the first message.
        TURN: where the last request of the conversation ended.
        END: behind the last block.
    """

    TOOLS = "tools"
    SYSTEM = "system"
    OPENING = "opening"
    TURN = "turn"
    END = "end"


PLACES = tuple(Place)
"""In the order in which they stand in a prompt."""


@dataclass(frozen=True, slots=True)
class PromptView:
    """A prompt's blocks.

    A block is what a client can put a breakpoint on: a tool, a block of the system prompt or of a
    message. Text and block traces do not show these: there a paragraph counts as one, or a block of
    the trace, and a prefix is found however far it ends before a breakpoint.

    Attributes:
        keys: for each block, a hash of all that stands up to its end: equal for two prompts that a
            cache of one organisation takes for the same up to there.
        ends: for each block, the prompt's tokens up to its end.
        places: the block at the end of each `Place` that the prompt has.
        marks: the breakpoints that the client set, as ``(block, TTL in seconds)``; one at the end
            where it leaves that to the server.
        marked: whether the client set any.
        lookback: how many blocks before a breakpoint a cached prefix is looked for; None for all.
    """

    keys: Sequence[int]
    ends: Sequence[int]
    places: Mapping[Place, int]
    marks: tuple[tuple[int, int], ...]
    marked: bool
    lookback: int | None

    @property
    def tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.ends[-1] if self.ends else 0


LOOKBACK = 20
"""Blocks before a breakpoint in which a hosted cache looks for a prefix that it has."""


class Views:
    """Makes views of prompts. Only views of one maker can be compared."""

    def __init__(self) -> None:
        regions = Config().regions
        self._defaults = {
            region: RegionDefault(regions.of(region).scope, _DEFAULT_TTL_S) for region in Region
        }

    def of_call(self, call: Call, fingerprint: Fingerprint) -> PromptView:
        """Return the view of a recorded request."""
        n = len(fingerprint)
        ends = _place_ends(fingerprint).items()
        marks = [
            (mark.part, mark.ttl_s or fingerprint.ttl_s or _DEFAULT_TTL_S)
            for mark in fingerprint.marks
        ]
        if fingerprint.automatic and n:
            marks.append((n - 1, fingerprint.ttl_s or _DEFAULT_TTL_S))
        return PromptView(
            self._keys(call, fingerprint),
            fingerprint.ends,
            {place: end - 1 for place, end in ends if end},
            tuple(dict(marks[-4:]).items()),
            bool(fingerprint.marks),
            LOOKBACK if call.text is None else None,
        )

    def of_blocks(self, call: BlockCall) -> PromptView:
        """Return the view of a call in a block trace: all that is known are hashes of prefixes."""
        ends = [min((i + 1) * BLOCK_TOKENS, call.tokens) for i in range(len(call.blocks))]
        # The last block has another hash once the conversation goes on, unless it is whole.
        last = call.tokens // BLOCK_TOKENS - 1
        if last < 0:
            return PromptView(call.blocks, ends, {}, (), False, None)
        marks = ((last, _DEFAULT_TTL_S),)
        return PromptView(call.blocks, ends, {Place.END: last}, marks, False, None)

    def _keys(self, call: Call, fingerprint: Fingerprint) -> "array[int]":
        """Return a hash of the prompt up to the end of each part, with whom it is shared with."""
        front: list[tuple[str, bytes]] = []
        rest: list[tuple[str, bytes]] = []
        for param in sorted(fingerprint.params.items()):
            if param[0] not in ROUTING_PARAMS:
                (front if is_front(param[0]) else rest).append(param)
        private = self._private_from(call, fingerprint)
        key = hash((fingerprint.protocol, fingerprint.model, tuple(front)))
        keys = array("q")
        for part in range(len(fingerprint)):
            if part == fingerprint.static_parts:
                key = hash((key, tuple(rest)))
            if part == private:
                key = hash((key, call.session or call.source))
            key = hash((key, fingerprint.hash(part)))
            keys.append(key)
        return keys

    def _private_from(self, call: Call, fingerprint: Fingerprint) -> int:
        """Return the part from which on the prompt is its session's own."""
        shared: set[str] = set()
        cut = segments(call.request, self._defaults)
        if all(segment.scope is not Scope.SESSION for segment in cut):
            return -1
        left = iter(cut)
        segment = next(left)
        for part in call.request.parts:
            if segment.scope is Scope.SESSION:
                break
            shared.add(part.path)
            if part is segment.after:
                segment = next(left)
        paths = fingerprint.paths.split("\n")
        return next((i for i, path in enumerate(paths) if path not in shared), -1)


def _place_ends(fingerprint: Fingerprint) -> dict[Place, int]:
    """Return how many parts each place has before it; 0 for a place that the prompt has not."""
    tools, static, n = fingerprint.counts[Region.TOOLS], fingerprint.static_parts, len(fingerprint)
    opening = static
    while opening < n and (opening == static or not fingerprint.has(opening, Trait.STARTS)):
        opening += 1
    turn = fingerprint.parent_parts
    return {
        Place.TOOLS: tools if tools < static else 0,
        Place.SYSTEM: static if static < n else 0,
        Place.OPENING: opening if static < opening < n else 0,
        Place.TURN: turn if opening < turn < n else 0,
        Place.END: n,
    }
