"""What the CPU tier's policy keeps, next to other policies and the optimum, and how fast it is.

Without arguments it replays a generated load of chats and agents. With ``--trace FILE`` (several
times: a block trace, or files of one session each, as text) it replays those.
"""

import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cloned_sessions import AgentLoad, agent_load, live_blocks
from benchmarks.harness import Figure, Result, Spread, finish
from benchmarks.recorded_traces import TEXT_BLOCK, trace_arguments
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.runs import RequestSignals
from vllm_cachescope.cli.simulate.traced_calls import traced
from vllm_cachescope.cli.traffic import BLOCK_TOKENS
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.simulation.marked_conversations import LONG_TTL_S, mark_conversations
from vllm_cachescope.simulation.policies import PEERS, make_cache
from vllm_cachescope.simulation.replay import Outcome, replay
from vllm_cachescope.simulation.simulated_cache import ExpiringLru
from vllm_cachescope.simulation.traced_request import TracedRequest

_CAPACITIES = (1000, 5000, 10_000, 20_000)
_PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
_LOADS = {
    "24 agents with pauses": AgentLoad(24, 300, pause_chance=0.08, pause_s=120.0),
    "48 agents without": AgentLoad(48, 400),
}
_LONG_SHARE = EvictionSettings().long_share
_RATE = 300_000
_BYTES = 200
_SEEDS = (1, 2, 3)


def chats(seed: int, conversations: int) -> list[TracedRequest]:
    """Return a generated trace: of three conversations one goes on, those with long answers more
    often, after minutes."""
    rng = random.Random(seed)
    found: list[TracedRequest] = []
    for number in range(conversations):
        at, size = number * 0.6 + rng.random(), 1 + int(rng.lognormvariate(2.2, 1.0))
        turn = 0
        while True:
            output = int(rng.lognormvariate(5.5, 0.8))
            head = (b"system %d" % (number % 3),) * 1
            keys = head + tuple(b"%d/%d" % (number, block) for block in range(size))
            tokens = len(keys) * BLOCK_TOKENS
            found.append(TracedRequest(at, keys, tokens, RequestSignals(output)))
            if rng.random() > min(0.9, 0.15 + 0.15 * turn + output / 3000):
                break
            turn += 1
            at += rng.lognormvariate(4.8, 0.8)
            size += 1 + int(rng.lognormvariate(0.5, 0.7))
    return sorted(found, key=lambda request: request.at)


def sessions(seed: int, count: int) -> list[list[TracedRequest]]:
    """Return generated sessions of agents, each of which adds to its prompt at every turn."""
    rng = random.Random(seed)
    found: list[list[TracedRequest]] = []
    for number in range(count):
        at, size, session = 0.0, 12 + rng.randrange(20), []
        for _ in range(8 + rng.randrange(30)):
            keys = tuple(b"s%d" % block for block in range(10))
            keys += tuple(b"%d/%d/" % (number, block) for block in range(size))
            signals = RequestSignals(int(rng.lognormvariate(4.5, 0.7)))
            session.append(TracedRequest(at, keys, len(keys) * TEXT_BLOCK, signals))
            at += rng.lognormvariate(1.5, 0.8)
            size += rng.randrange(5)
        found.append(session)
    return found


def ratios(requests: Sequence[TracedRequest], capacity: int, block: int) -> dict[str, Outcome]:
    """Return what each policy reads of a trace."""
    return {
        policy: replay(requests, make_cache(policy, capacity, requests, _LONG_SHARE), block)
        for policy in ("belady", "learned", *PEERS)
    }


def speed(requests: Sequence[TracedRequest], capacity: int) -> float:
    """Return how many block references a second the policy takes on one core; fits run on a thread
    of their own in an engine, and are not counted."""
    fitting = 0.0

    def compute(fit: object) -> None:
        nonlocal fitting
        began = time.thread_time()
        fit()  # type: ignore[operator]
        fitting += time.thread_time() - began

    order = LearnedOrder(long_blocks=int(capacity * _LONG_SHARE), compute=compute)
    pieces = [[(request.keys, 300, b"")] for request in requests]
    gc.collect()
    began = time.thread_time()
    for request, piece in zip(requests, pieces, strict=True):
        order.use_request(piece, request.at, request.signals)
        if (over := len(order) - capacity) > 0:
            order.remove_all(order.victims(over, request.at, _none) or ())
    took = time.thread_time() - began - fitting
    return sum(len(request.keys) for request in requests) / took


def memory(blocks: int) -> float:
    """Return the bytes of a resident block, without its key, with so many of them."""
    keys = [[b"%9d/%5d" % (n, block) for block in range(20)] for n in range(blocks // 20)]
    order = LearnedOrder()
    tracemalloc.start()
    for number, prompt in enumerate(keys):
        order.use_request([(prompt, 300, b"")], number * 0.1, RequestSignals(number % 997))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(order)


def _none(key: bytes) -> bool:
    return False


def _one(name: str, value: float, unit: str, target: str = "", holds: bool | None = None) -> Figure:
    return Figure(name, Spread.of([value]), unit, target, holds)


def _chat_figures(requests: list[TracedRequest], block: int) -> list[Figure]:
    figures = []
    for capacity in _CAPACITIES:
        found = {
            name: outcome.total.ratio for name, outcome in ratios(requests, capacity, block).items()
        }
        best = max(ratio for name, ratio in found.items() if name in PEERS)
        learned = found["learned"]
        figures += [
            _one(f"{capacity:,} blocks: {name}", ratio, "") for name, ratio in found.items()
        ]
        figures.append(
            _one(
                f"{capacity:,} blocks: learned less the best peer",
                learned - best,
                "",
                "≥ -0.01",
                learned - best >= -0.01,
            )
        )
    marked = mark_conversations(requests, 0.2, random.Random(0))
    for capacity in _CAPACITIES:
        # No policy may serve what has expired, so neither may the LRU that it is compared with.
        lru = replay(marked, ExpiringLru(capacity), block)
        ours = replay(marked, make_cache("learned", capacity, marked, _LONG_SHARE), block)
        gain = ours.total.ratio - lru.total.ratio
        of_long = ours.by_ttl[LONG_TTL_S].ratio - lru.by_ttl[LONG_TTL_S].ratio
        figures += [
            _one(f"{capacity:,} blocks, a fifth 1h: total less LRU", gain, "", "≥ 0", gain >= 0),
            _one(f"{capacity:,} blocks, a fifth 1h: 1h less LRU", of_long, "", "> 0", of_long > 0),
        ]
    return figures


def _agent_figures(recorded: list[list[TracedRequest]], seeds: Sequence[int]) -> list[Figure]:
    figures = []
    for name, load in _LOADS.items():
        load = replace(load, sessions=load.sessions // (5 if len(seeds) == 1 else 1))
        shares: dict[tuple[float, str], list[float]] = {}
        for seed in seeds:
            clones = agent_load(recorded, load, random.Random(seed))
            live = live_blocks(clones, load.agents)
            requests = [replace(request, org="") for request in clones]
            for part in _PARTS:
                found = ratios(requests, max(1, int(live * part)), TEXT_BLOCK)
                best = found.pop("belady").total.ratio
                for policy, outcome in found.items():
                    shares.setdefault((part, policy), []).append(outcome.total.ratio / best)
        figures += [
            Figure(
                f"{name}, 1/{1 / part:.0f} of the live set: {policy}", Spread.of(of), "of Belady"
            )
            for (part, policy), of in shares.items()
        ]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and return 1 if a target was missed."""
    args, recorded = trace_arguments(__doc__ or "", argv)
    blocks, texts = recorded.blocks, recorded.texts
    chat = traced(blocks, TEXT_BLOCK, None) if blocks else chats(0, 600 if args.quick else 6000)
    agents = texts or sessions(0, 12)
    figures = [] if texts and not blocks else _chat_figures(chat, BLOCK_TOKENS)
    if texts or not blocks:
        figures += _agent_figures(agents, _SEEDS[:1] if args.quick else _SEEDS)
    rates = [speed(chat, 10_000) for _ in range(1 if args.quick else 3)]
    rate = statistics.median(rates)
    figures.append(
        Figure("block references a second", Spread.of(rates), "/s", f"≥ {_RATE:,}", rate >= _RATE)
    )
    held = memory(20_000 if args.quick else 1_000_000)
    figures.append(_one("a resident block", held, "bytes", f"≤ {_BYTES}", held <= _BYTES))
    return finish(Result("policy", args.quick, figures), args.results)


if __name__ == "__main__":
    sys.exit(main())
