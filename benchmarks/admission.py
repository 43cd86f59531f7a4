"""What it would save and cost to write to a remote tier only what is likely to return.

Two tiers are simulated: memory with the production policy, and behind it a store whose blocks
expire. A block that memory has learned to be worth less than a share of all others is not
written. That is told when a request is over: an engine would have to tell earlier, and know less.

Without arguments it replays a generated load; with ``--trace FILE`` as `benchmarks.policy`.
"""

import random
import sys
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Sequence

from benchmarks.cloned_sessions import AgentLoad, agent_load, live_blocks
from benchmarks.harness import Figure, Result, Spread, finish
from benchmarks.policy import chats, sessions
from benchmarks.recorded_traces import trace_arguments
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cli.simulate.traced_calls import traced
from vllm_cachescope.cli.traffic import BLOCK_TOKENS
from vllm_cachescope.simulation.traced_request import TracedRequest

_REFUSED = (0.0, 0.1, 0.25, 0.5)
_LIFETIMES_S = (300, 3600)
_RECENT = 512


class _Recent:
    """The prices of the latest blocks."""

    def __init__(self) -> None:
        self._queue: deque[float] = deque()
        self._sorted: list[float] = []

    def is_low(self, price: float, share: float) -> bool:
        """Whether a price is below those of a share of the latest; note it."""
        bound = self._sorted[int(share * len(self._sorted))] if self._sorted else 0.0
        self._queue.append(price)
        insort(self._sorted, price)
        if len(self._queue) > _RECENT:
            self._sorted.remove(self._queue.popleft())
        return price < bound


def two_tiers(
    requests: Sequence[TracedRequest], memory: int, lifetime_s: int, refused: float
) -> tuple[float, int]:
    """Return the share of blocks that was read from either tier, and how many were written.

    Args:
        requests: in order of time.
        memory: how many blocks memory holds.
        lifetime_s: after how many seconds without use the store forgets a block.
        refused: which share of the blocks is not written, by their price.
    """
    order, store = LearnedOrder(), OrderedDict[bytes, float]()
    recent = _Recent()
    read = blocks = written = 0
    for request in requests:
        while store and next(iter(store.values())) + lifetime_s <= request.at:
            store.popitem(last=False)
        hit = 0
        for key in request.keys:
            if key not in order.runs and key not in store:
                break
            hit += 1
        read, blocks = read + hit, blocks + len(request.keys)
        order.use_request([(request.keys, 300, b"")], request.at, request.signals)
        for key in request.keys:
            if key in store:
                store[key] = request.at
                store.move_to_end(key)
            elif not recent.is_low(order.price_of(key), refused):
                store[key] = request.at
                written += 1
        if (over := len(order) - memory) > 0:
            order.remove_all(order.victims(over, request.at, lambda key: False) or ())
    return read / blocks, written


def _figures(name: str, requests: Sequence[TracedRequest], memory: int) -> list[Figure]:
    found = []
    for lifetime_s in _LIFETIMES_S:
        all_read, all_written = two_tiers(requests, memory, lifetime_s, 0.0)
        for refused in _REFUSED:
            read, written = two_tiers(requests, memory, lifetime_s, refused)
            label = f"{name}, {memory:,} blocks, {lifetime_s} s, {refused:.0%} refused"
            saved = 1 - written / all_written
            found += [
                Figure(f"{label}: blocks read", Spread.of([read]), ""),
                Figure(f"{label}: reads lost", Spread.of([1 - read / all_read]), ""),
                Figure(f"{label}: writes saved", Spread.of([saved]), ""),
            ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; there is no target."""
    args, recorded = trace_arguments(__doc__ or "", argv)
    blocks, texts = recorded.blocks, recorded.texts
    figures: list[Figure] = []
    if blocks or not texts:
        chat = traced(blocks, BLOCK_TOKENS, None) if blocks else chats(0, 600)
        figures += _figures("conversations", chat, 5000 if blocks else 500)
    if texts or not blocks:
        load = AgentLoad(48, 60 if args.quick or not texts else 400)
        clones = agent_load(texts or sessions(0, 12), load, random.Random(1))
        figures += _figures("agents", clones, max(1, live_blocks(clones, load.agents) // 4))
    return finish(Result("admission", args.quick, figures), args.results)


if __name__ == "__main__":
    sys.exit(main())
