"""What a running engine evicts first once it is told that a session or a conversation is over."""

import random
from collections.abc import Iterator

import pytest

from tests.engine.engine import BLOCK, OWNERS, Engine, draw_tokens, org_plan, plan
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.return_counts import OVER
from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_order import make_learned
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

MAIN = Caller("acme", "main")

OVER_PRICE = Prices((), ()).of(OVER)
"""Of what is known not to return; all else has a higher one."""


def org_wide(caller: Caller, tokens: list[int]) -> Plan:
    """Return the default plan: what a session computes its organisation may read."""
    return plan(caller, (len(tokens), Scope.ORG, 300))


def queue(engine: Engine) -> list[bytes]:
    """Return the keys of the device's free blocks in the order in which vLLM takes them."""
    blocks = engine.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
    return [block.block_hash for block in blocks if block.block_hash is not None]


def keys_of(engine: Engine, tokens: list[int], told: Plan) -> list[bytes]:
    """Return the keys of a prompt's blocks, by what the engine keeps of it."""
    prompts = engine.connector.cachescope._ends._prompts._sessions[told.owner]  # noqa: SLF001
    return list(prompts[told.nonce].keys[: len(tokens) // BLOCK])


def cpu_order(engine: Engine) -> LearnedOrder:
    return engine.connector.cachescope.local._cpu._policy._order  # noqa: SLF001


def first_victims(engine: Engine, count: int) -> set[bytes]:
    """Return what the CPU tier would evict next."""
    now = engine.connector.cachescope.now()
    return set(cpu_order(engine).victims(count, now, lambda key: False))


def price_in_memory(engine: Engine, key: bytes) -> float:
    """Return the price of a block's place in the CPU tier."""
    return cpu_order(engine).price_of(key)


def step_on(engine: Engine) -> None:
    """Have the policy hear of all that is over: vLLM tells it with the next step."""
    other = draw_tokens(random.Random("another"), BLOCK // 2)
    engine.ask(other, org_plan("another", other))


def fill(engine: Engine, chance: random.Random, blocks: int) -> None:
    """Compute prompts of so many blocks."""
    while blocks:
        part = min(blocks, 24)
        tokens = draw_tokens(chance, part * BLOCK)
        engine.ask(tokens, org_plan("big", tokens), max_tokens=1)
        blocks -= part


def evicted_from_device(engine: Engine, keys: list[bytes]) -> int:
    local = engine.connector.cachescope.local
    return sum(not local.on_device(key) for key in keys)


def test_blocks_of_an_ended_subagent_go_first_and_nothing_else(engine, chance) -> None:
    system = draw_tokens(chance, 2 * BLOCK)
    sub, parent, other = (system + draw_tokens(chance, 3 * BLOCK + 5) for _ in range(3))
    told = {}
    for name, caller, tokens in (
        ("parent", MAIN, parent), ("other", Caller("acme", "other"), other), ("sub", MAIN, sub),
    ):  # fmt: skip
        told[name] = org_wide(caller, tokens)
        engine.ask(tokens, told[name])
    own = keys_of(engine, sub, told["sub"])[2:]
    kept = keys_of(engine, parent, told["parent"])
    # At once, although the policy has not heard of the last request yet.
    engine.connector.command_endings([(told["sub"].nonce, int(Ended.OVER))])
    step_on(engine)
    assert first_victims(engine, 3) == set(own)
    # vLLM alone would evict what was used first, which this is not.
    assert not {*queue(engine)[:3]} & {*own}
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    empty = free - len(queue(engine))
    fill(engine, chance, empty + 2)
    assert evicted_from_device(engine, own) == 2
    assert not evicted_from_device(engine, kept)
    # From the end on, so that what is left can be read.
    assert engine.connector.cachescope.local.on_device(own[0])
    again = org_wide(MAIN, sub)
    assert engine.ask(sub, again).read == 5 * BLOCK


def test_what_another_session_has_used_stays_where_it_was(engine, chance) -> None:
    tokens = draw_tokens(chance, 3 * BLOCK + 5)
    first = org_wide(MAIN, tokens)
    engine.ask(tokens, first)
    engine.ask(tokens, org_wide(Caller("acme", "other"), tokens))
    step_on(engine)
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "main")) == 0
    # Nor can an organisation end what another one has: its plans name its own sessions.
    second = draw_tokens(chance, 3 * BLOCK + 5)
    engine.ask(second, org_wide(MAIN, second))
    assert engine.connector.command_end_session(OWNERS.prefix("evil", "main")) == 0
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "main")) == 6


def test_a_session_without_session_scope_can_be_over_as_well(engine, chance) -> None:
    over, other = (draw_tokens(chance, 4 * BLOCK + 7) for _ in range(2))
    told = org_wide(MAIN, over)
    engine.ask(over, told)
    engine.ask(other, org_wide(Caller("acme", "other"), other))
    keys = keys_of(engine, over, told)
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "main")) == 8
    step_on(engine)
    assert first_victims(engine, 4) == set(keys)
    assert all(price_in_memory(engine, key) == OVER_PRICE for key in keys)
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "main")) == 0


def test_a_compaction_lets_what_it_replaced_go(engine, chance) -> None:
    system, old, summary = (draw_tokens(chance, 2 * BLOCK) for _ in range(3))
    before = org_wide(MAIN, system + old + old)
    engine.ask(system + old + old, before)
    keys = keys_of(engine, system + old + old, before)
    engine.ask(system + summary, org_wide(MAIN, system + summary))
    engine.connector.command_endings([(before.nonce, int(Ended.OVER))])
    step_on(engine)
    assert first_victims(engine, 4) == set(keys[2:])


def test_what_goes_on_is_not_over_and_what_is_used_again_is_kept(engine, chance) -> None:
    oldest, tokens = (draw_tokens(chance, 3 * BLOCK) for _ in range(2))
    engine.ask(oldest, org_plan("acme", oldest), max_tokens=1)
    first = org_wide(MAIN, tokens)
    engine.ask(tokens, first, max_tokens=1)
    longer = tokens + draw_tokens(chance, BLOCK)
    told = org_wide(MAIN, longer)
    engine.ask(longer, told, max_tokens=1)
    keys = keys_of(engine, longer, told)
    order = engine.connector.cachescope.local._device_order  # noqa: SLF001
    known = len(order)
    engine.connector.command_endings([(first.nonce, int(Ended.OVER))])
    assert len(order) == known
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "main")) == 8
    assert all(price_in_memory(engine, key) == OVER_PRICE for key in keys)
    engine.clock.advance(1)
    # Used once more before there was need of room, and before the next step told the policy.
    engine.ask(longer, org_wide(MAIN, longer), max_tokens=1)
    step_on(engine)
    # Whether they are the cheapest depends on what was learned before; over they are not.
    assert len(keys) == 4 and all(price_in_memory(engine, key) > OVER_PRICE for key in keys)
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    fill(engine, chance, free - len(queue(engine)) + 2)
    assert not evicted_from_device(engine, keys)


@pytest.fixture
def learned_engine(engine) -> Iterator[Engine]:
    """The engine, empty, as if it had been started with ``eviction.device: learned``."""
    device = engine.connector.cachescope.local._device_order  # noqa: SLF001
    device._order = make_learned(EvictionSettings(device="learned"), 64)  # noqa: SLF001
    yield engine
    device._order = None  # noqa: SLF001


def test_the_device_evicts_what_the_learned_order_gives_first(learned_engine, chance) -> None:
    engine = learned_engine
    local = engine.connector.cachescope.local
    order = local._device_order._order  # noqa: SLF001
    pool = engine.scheduler.kv_cache_manager.block_pool
    prompts = [draw_tokens(chance, 12 * BLOCK) for _ in range(3)]
    for tokens in prompts:
        engine.clock.advance(10)
        told = org_wide(MAIN, tokens)
        engine.ask(tokens, told, max_tokens=1)
        engine.connector.command_endings([(told.nonce, int(Ended.ANSWER))])
    held = set(queue(engine))
    assert held == set(order.runs)
    # What is least worth by the order is not what is unused for longest.
    order.retire(keys_of(engine, prompts[2], told)[4:])
    cheapest = order.victims(5, engine.clock(), lambda key: False)
    assert not {*cheapest} & {*queue(engine)[:24]}
    fill(engine, chance, pool.get_num_free_blocks() - len(queue(engine)) + 5)
    local.drop_expired()
    assert evicted_from_device(engine, list(held)) == evicted_from_device(engine, cheapest) == 5
    # The order holds what the device does, whatever comes, goes and is dropped.
    for number in range(12):
        tokens = prompts[number % 3][: chance.randrange(1, 12) * BLOCK] + draw_tokens(chance, BLOCK)
        engine.ask(tokens, org_wide(MAIN, tokens), max_tokens=1)
        local.drop_expired()
        assert set(order.runs) == set(queue(engine))
    engine.connector.command_purge(OWNERS.prefix("acme"), "a purge")
    assert set(order.runs) == set(queue(engine))
    engine.empty_device()
    assert not order.runs
