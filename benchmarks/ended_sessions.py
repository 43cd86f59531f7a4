"""What it brings to a device without tiers behind it to hear that sessions are over, and what that
costs a request.

vLLM's own order of eviction (least recently used) is replayed with agents' sessions, of which some
say that they are over. What that takes is measured on vLLM's own pool of blocks.
"""

import random
import statistics
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

from benchmarks.cloned_sessions import AgentLoad, agent_load, live_blocks
from benchmarks.harness import Figure, Result, Spread, finish
from benchmarks.policy import sessions
from benchmarks.recorded_traces import TEXT_BLOCK, trace_arguments
from vllm_cachescope.simulation.policies import make_cache
from vllm_cachescope.simulation.replay import replay
from vllm_cachescope.simulation.traced_request import TracedRequest

_PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
_TOLD = (0.0, 0.5, 1.0)
_SEEDS = (1, 2)


def read_with_ends(
    requests: Sequence[TracedRequest], capacity: int, told: float, rng: random.Random
) -> float:
    """Return the share of blocks that is read from a device of so many.

    Args:
        requests: in order of time; each one's session is its ``org``.
        capacity: how many blocks the device has.
        told: which share of the sessions says that it is over.
        rng: draws them.
    """
    left = Counter(request.org for request in requests)
    says = {org: rng.random() < told for org in left}
    users: dict[bytes, set[str]] = {}
    held, over = OrderedDict[bytes, None](), OrderedDict[bytes, None]()
    read = blocks = 0
    for request in requests:
        hit = 0
        for key in request.keys:
            if key not in held and key not in over:
                break
            hit += 1
        read, blocks = read + hit, blocks + len(request.keys)
        for key in reversed(request.keys):
            over.pop(key, None)
            held[key] = None
            held.move_to_end(key)
            users.setdefault(key, set()).add(request.org)
        while len(held) + len(over) > capacity:
            (over or held).popitem(last=False)
        left[request.org] -= 1
        if not left[request.org] and says[request.org]:
            for key in reversed(request.keys):
                if key in held and len(users[key]) == 1:
                    del held[key]
                    over[key] = None
    return read / blocks


def cost_us(blocks: int, wanted: int) -> tuple[float, float, float]:
    """Return in how many microseconds vLLM gives ``wanted`` of its ``blocks``, all of which hold
    something: alone, with our hook and nothing over, and where ended ones are given instead."""
    from vllm.v1.core.block_pool import BlockPool

    from tests.engine.device_pool import pool_of
    from vllm_cachescope.cache.ledger import Ledger
    from vllm_cachescope.connectors.vllm.engine.tiers.device_order import DeviceOrder

    def took(pool: BlockPool, rounds: int) -> float:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            pool.get_new_blocks(wanted)
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e6

    rounds = blocks // wanted // 2
    alone = took(pool_of(blocks)[0], rounds)
    pool, _ = pool_of(blocks)
    DeviceOrder(pool, Ledger())
    idle = took(pool, rounds)
    pool, keys = pool_of(blocks)
    DeviceOrder(pool, Ledger()).retire(keys, 0.0)
    return alone, idle, took(pool, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; there is no target."""
    args, recorded = trace_arguments(__doc__ or "", argv)
    load = AgentLoad(48, 60 if args.quick else 400)
    shares: dict[str, list[float]] = {}
    for seed in _SEEDS[:1] if args.quick else _SEEDS:
        clones = agent_load(recorded.texts or sessions(0, 12), load, random.Random(seed))
        for part in _PARTS:
            capacity = max(1, int(live_blocks(clones, load.agents) * part))
            best = replay(clones, make_cache("belady", capacity, clones, 0), TEXT_BLOCK).total.ratio
            for told in _TOLD:
                found = read_with_ends(clones, capacity, told, random.Random(seed))
                name = f"1/{1 / part:.0f} of the live set, {told:.0%} of the sessions say so"
                shares.setdefault(name, []).append(found / best)
    figures = [Figure(name, Spread.of(of), "of Belady") for name, of in shares.items()]
    for wanted in (1, 64, 512):
        for name, us in zip(
            ("vLLM alone", "nothing is over", "all are over"), cost_us(20_000, wanted), strict=True
        ):
            figures.append(Figure(f"{wanted} blocks given, {name}", Spread.of([us]), "µs"))
    return finish(Result("ended_sessions", args.quick, figures), args.results)


if __name__ == "__main__":
    sys.exit(main())
