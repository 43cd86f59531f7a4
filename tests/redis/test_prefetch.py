"""What a session that waits for a tool will read comes back into the CPU tier in time, within the
operator's share and at nobody else's cost."""

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, OWNERS, Ask, draw_tokens, org_plan, plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import wait_until
from tests.redis.test_burst import Behind, DiskBehind, RedisBehind
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

CPU_CHUNKS = 16
SHARE = 0.5
GAP_S = 10.0


@pytest.fixture(
    scope="module", params=[RedisBehind, pytest.param(DiskBehind, marks=pytest.mark.slow)]
)
def behind(request, tmp_path_factory) -> Iterator[Behind]:
    behind: Behind = request.param(tmp_path_factory.mktemp("behind"))
    yield behind
    behind.close()


@pytest.fixture(scope="module")
def replica(tmp_path_factory, behind) -> Iterator[Replica]:
    replica = Replica(
        build(MODELS / "tiny", TINY),
        tmp_path_factory.mktemp("prefetch"),
        {
            "tiers": [{**behind.tier, "load_deadline": "3s", "first_probe": "50ms"}],
            "eviction": {"prefetch_share": SHARE},
        },
        cpu_chunks=CPU_CHUNKS,
        num_gpu_blocks_override=34,
    )
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture
def engine(replica: Replica, behind: Behind) -> Replica:
    behind.clear()
    replica.call("empty")
    return replica


def org_wide(caller: Caller, tokens: list[int]) -> Plan:
    return plan(caller, (len(tokens), Scope.ORG, 300))


def come(engine: Any) -> dict[str, float]:
    """Return how many chunks were prefetched so far, by what became of them."""
    from tests.engine.samples import samples
    from vllm_cachescope.metrics import PREFETCHED_CHUNKS

    return {outcome: count for (outcome,), count in samples(PREFETCHED_CHUNKS).items()}


def in_memory(engine: Any) -> int:
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    return len(policy.ready())


def step(engine: Replica) -> None:
    """Let the engine take a step; what it computes is too short to be cached."""
    short = draw_tokens(random.Random("short"), BLOCK // 2)
    engine.run(Ask(short, sealed(org_plan("short", short)), max_tokens=1))


def waits_for_tool(
    engine: Replica, behind: Behind, caller: Caller, tokens: list[int], more: list[int]
) -> list[int]:
    """Have a session call a tool twice, `GAP_S` long, and once more, and all of it leave the local
    tiers; return the prompt that has called."""
    before = behind.blocks()
    for turn in itertools.count():
        told = org_wide(caller, tokens)
        engine.run(Ask(tokens, sealed(told), max_tokens=1))
        engine.call("command_endings", [(told.nonce, int(Ended.TOOLS))])
        if turn == 2:
            break
        engine.call(advance, GAP_S)
        tokens = tokens + more[turn * BLOCK : (turn + 1) * BLOCK]
    wait_until(lambda: behind.blocks() - before >= len(tokens) // BLOCK)
    engine.call("empty")
    return tokens


def advance(engine: Any, seconds: float) -> None:
    engine.clock.advance(seconds)


def test_it_is_there_before_the_session_asks(engine, behind, chance) -> None:
    caller, before = Caller("acme", "waits"), engine.call(come)
    begin, more = draw_tokens(chance, 4 * BLOCK + 5), draw_tokens(chance, 3 * BLOCK)
    tokens = waits_for_tool(engine, behind, caller, begin, more)
    blocks = len(tokens) // BLOCK
    engine.call(advance, GAP_S / 2)
    step(engine)
    step(engine)
    assert engine.call(in_memory) == 0
    engine.call(advance, GAP_S / 4)

    def is_there() -> bool:
        step(engine)
        return bool(engine.call(in_memory) == blocks)

    wait_until(is_there)
    asked = tokens + more[2 * BLOCK :]
    (answer,) = engine.run(Ask(asked, sealed(org_wide(caller, asked)), max_tokens=4))
    assert answer.outcome("read_cpu") == blocks * BLOCK
    assert answer.tokens == engine.call("uncached", asked, 4)
    step(engine)
    now = engine.call(come)
    grown = {outcome: now[outcome] - before.get(outcome, 0) for outcome in now}
    assert grown == {"loaded": blocks, "used": blocks}


def watch(engine: Any) -> None:
    """Note what each eviction for a prefetch costs and brings, by the policy's prices."""
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    prefetches, evict = engine.connector.cachescope.prefetches, policy.evict
    engine.exchanged = []

    def watched(n: int, protected: set[Any]) -> Any:
        price, active = policy.next_victim_worth(), [*prefetches._active.values()]  # noqa: SLF001
        evicted = evict(n, protected)
        if evicted and any({*protected} & {*one.context._offload_key_positions} for one in active):  # noqa: SLF001
            engine.exchanged.append((price, active[0].worth))
        return evicted

    policy.evict = watched


def exchanged(engine: Any) -> list[tuple[float, float]]:
    found, engine.exchanged = engine.exchanged, []
    return found


def forget(engine: Any) -> None:
    """Let the policy remember nothing of what it has evicted."""
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    for first in list(policy._order._gone.runs):  # noqa: SLF001
        policy._order._gone._forget(first)  # noqa: SLF001


def test_no_more_than_the_share_and_nothing_that_is_worth_more_is_pushed_out(
    engine, behind, chance
) -> None:
    engine.call(watch)
    for number in range(3):
        before = engine.call(come).get("loaded", 0)
        begin, more = draw_tokens(chance, 10 * BLOCK + 5), draw_tokens(chance, 3 * BLOCK)
        waits_for_tool(engine, behind, Caller("acme", f"long {number}"), begin, more)
        # Another organisation fills the tier with what it uses.
        other = draw_tokens(chance, CPU_CHUNKS * BLOCK)
        busy = Caller("other", f"busy {number}")
        engine.run(Ask(other, sealed(org_wide(busy, other)), max_tokens=1))
        step(engine)
        assert engine.call(in_memory) == CPU_CHUNKS
        if number == 0:
            # Of blocks that nothing is known of, none is worth another's.
            engine.call(forget)
        if number == 2:
            engine.call("command_end_session", OWNERS.prefix("other", busy.session))
        engine.call(advance, 0.75 * GAP_S)
        for _ in range(40):
            step(engine)
            time.sleep(0.01)
        loaded = engine.call(come).get("loaded", 0) - before
        exchanges = engine.call(exchanged)
        assert len(exchanges) == loaded <= int(SHARE * CPU_CHUNKS)
        assert all(price < worth for price, worth in exchanges)
        if number == 0:
            assert not loaded
        elif number == 2:
            assert loaded == int(SHARE * CPU_CHUNKS)
        engine.call(advance, 1000)
        step(engine)
