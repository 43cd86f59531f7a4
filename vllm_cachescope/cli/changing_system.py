"""System blocks that differ in every request of a conversation."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.wire.billing_header import is_dropped
from vllm_cachescope.wire.body import encode

_REQUESTS = 3
"""A block that differs between two requests may be that of another agent of the session."""

_Conversation = tuple[str | None, str, int]  # session, model, and how many system blocks


@dataclass(slots=True)
class _Block:
    """What a system block held, request by request.

    Attributes:
        source: file and line of the first request that had another one than before.
        requests: how many requests had the block.
        contents: hashes of what it held.
    """

    source: str = ""
    requests: int = 0
    contents: set[int] = field(default_factory=set)


class ChangingSystem:
    """Notices system blocks of which no two requests of a conversation have the same."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[_Conversation, str], _Block] = defaultdict(_Block)

    def see(self, call: Call) -> None:
        """Take note of a call's system blocks."""
        request = call.request
        parts = [part for part in request.parts if part.region is Region.SYSTEM]
        if request.protocol is Protocol.MESSAGES:
            parts = [part for part in parts if not is_dropped(part)]  # vLLM leaves them out.
        conversation = (call.session, request.model, len(parts))
        for part in parts:
            self._see(self._blocks[conversation, part.path], call, part)

    def found(self) -> Iterator[tuple[str, str, int]]:
        """Yield the path of each such block, the first request in which it had changed, and how
        many requests had it."""
        for (_, path), block in self._blocks.items():
            if _REQUESTS <= block.requests == len(block.contents):
                yield path, block.source, block.requests

    @staticmethod
    def _see(block: _Block, call: Call, part: Part) -> None:
        block.requests += 1
        block.contents.add(hash(encode(part.content)))
        if len(block.contents) > 1:
            block.source = block.source or call.source
