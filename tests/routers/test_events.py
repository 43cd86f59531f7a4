"""What routers learn from an engine's KV events, by their own rules, over ZMQ."""

import random

import pytest

from tests.engine.engine import (
    BLOCK,
    CPU_CHUNKS,
    OWNERS,
    Ask,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from tests.redis.servers import wait_until
from tests.routers.fleet import GREEDY, GREEDY_BLOCKS
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

BLOCKS = 6


@pytest.fixture
def draw(request):
    """A function that draws the tokens of a prompt of so many blocks, and a few more."""
    chance = random.Random(request.node.name)
    return lambda blocks=BLOCKS: draw_tokens(chance, blocks * BLOCK + 7)


def ask(tokens, org="acme", ttl_s=300, salt=""):
    return Ask(tokens, sealed(org_plan(org, tokens, ttl_s)), 1, salt)


def mixed(tokens) -> Ask:
    """Return a prompt whose blocks are everyone's, its organisation's and its session's."""
    ends = zip((2 * BLOCK, 4 * BLOCK, len(tokens)), Scope, strict=True)
    cuts = [(end, scope, 300) for end, scope in ends]
    return Ask(tokens, sealed(plan(Caller("acme", "s1"), *cuts)), 1)


def matches(worker, tokens, salt="") -> list[int]:
    return [reader.matched(tokens, salt) for reader in (worker.events.llmd, worker.events.dynamo)]


def test_a_prompt_of_whatever_scope_is_found_whole(fleet, draw):
    prompts = [draw() for _ in range(3)]
    fleet.a.run(*map(mixed, prompts))
    fleet.a.settle()
    assert [matches(fleet.a, tokens) for tokens in prompts] == [[BLOCKS, BLOCKS]] * 3
    assert matches(fleet.a, draw()) == [0, 0]
    # Of several blocks in one event AIBrix finds the first one.
    assert all(fleet.a.events.aibrix.matched(tokens) > 0 for tokens in prompts)
    # The copies in memory are found by themselves.
    fleet.a.engine.call("empty_device")
    fleet.a.run(ask(draw()))
    fleet.a.settle()
    assert len(fleet.a.resident["CPU"]) == 4 * BLOCKS
    assert [matches(fleet.a, tokens) for tokens in prompts] == [[BLOCKS, BLOCKS]] * 3


def test_what_expires_while_it_is_being_stored_is_told_of_by_an_idle_engine(fleet, draw):
    fleet.server.stop()
    try:
        fleet.a.run(ask(draw()))
        fleet.a.engine.call("advance", 301)
        # The chunks cannot go yet: the tier is reading them.
        assert fleet.a.engine.call("command_sweep") > 0
        assert len(fleet.a.engine.call("event_hashes")["CPU"]) == BLOCKS
    finally:
        fleet.server.resume()
    wait_until(lambda: fleet.a.engine.call("command_sweep") is not None and not held(fleet.a))
    fleet.a.settle()


def held(worker) -> set[int]:
    """Return what the CPU tier holds."""
    return worker.engine.call("event_hashes")["CPU"]


def test_a_salted_prompt_is_found_by_its_salt_on_each_tier(fleet, draw):
    salt, tokens = "dynamo-cache-salt:acme", draw()
    fleet.a.run(ask(tokens, salt=salt))
    fleet.a.settle()
    assert matches(fleet.a, tokens, salt) == [BLOCKS, BLOCKS]
    assert matches(fleet.a, tokens) == [0, 0]
    fleet.a.engine.call("empty_device")
    fleet.a.run(ask(draw()))
    fleet.a.settle()
    assert matches(fleet.a, tokens, salt) == [BLOCKS, BLOCKS]
    assert matches(fleet.a, tokens) == [0, 0]


def test_what_expires_is_told_even_by_an_idle_engine(fleet, draw):
    short, long = draw(), draw()
    fleet.a.run(ask(short), ask(long, ttl_s=3600))
    fleet.a.settle()
    fleet.a.engine.call("advance", 301)
    assert fleet.a.engine.call("command_sweep") == BLOCKS
    fleet.a.settle()
    assert [len(held) for held in fleet.a.resident.values()] == [BLOCKS, BLOCKS]
    assert fleet.a.events.aibrix.held("") <= set().union(*fleet.a.resident.values())
    assert matches(fleet.a, long) == [BLOCKS, BLOCKS]


def test_what_expires_and_is_stored_again_in_one_step_is_found_again(fleet, draw):
    tokens = draw()
    for _ in range(3):
        fleet.a.run(ask(tokens))
        fleet.a.settle()
        assert len(fleet.a.resident["CPU"]) == BLOCKS
        assert matches(fleet.a, tokens) == [BLOCKS, BLOCKS]
        fleet.a.engine.call("advance", 301)


def test_what_is_purged_is_told_on_each_tier(fleet, draw):
    gone, left = draw(), draw()
    fleet.a.run(ask(gone), ask(left, org="zeta"))
    fleet.a.settle()
    wait_until(lambda: len(fleet.told()) == 2 * BLOCKS)
    assert fleet.told() == fleet.stored()
    assert fleet.a.events.dynamo.held("STORAGE") == set()
    fleet.a.engine.call("command_purge", OWNERS.prefix("acme"), "p")
    wait_until(lambda: fleet.a.engine.call("command_purged", "p") is not None)
    fleet.a.engine.call("command_sweep")
    fleet.a.settle()
    wait_until(lambda: len(fleet.told()) == BLOCKS)
    assert fleet.told() == fleet.stored()
    assert matches(fleet.a, left) == [BLOCKS, BLOCKS]
    assert matches(fleet.a, gone) == [0, 0]


def test_what_a_quota_evicts_is_told_on_each_tier(fleet, draw):
    for _ in range(3):
        fleet.a.run(ask(draw(4), org=GREEDY))
        fleet.a.settle()
    wait_until(lambda: fleet.told() == fleet.stored() and len(fleet.told()) == GREEDY_BLOCKS)
    assert [len(held) for held in fleet.a.resident.values()] == [GREEDY_BLOCKS, GREEDY_BLOCKS]


def test_what_is_evicted_for_want_of_room_is_told(fleet, draw):
    prompts = [draw(24) for _ in range(6)]
    for tokens in prompts:
        fleet.a.run(ask(tokens))
    fleet.a.settle()
    assert len(fleet.a.resident["CPU"]) == CPU_CHUNKS < len(prompts) * 24
    assert matches(fleet.a, prompts[-1]) == [24, 24]
    assert fleet.a.events.aibrix.held("") <= set().union(*fleet.a.resident.values(), fleet.told())


def test_what_one_engine_stores_for_all_it_alone_tells(fleet, draw):
    tokens = draw()
    fleet.a.run(ask(tokens))
    wait_until(lambda: len(fleet.stored()) == BLOCKS and fleet.told() == fleet.stored())
    (answer,) = fleet.b.run(ask(tokens))
    assert answer.outcome("read_redis") == BLOCKS * BLOCK
    fleet.b.settle()
    # What was loaded is in its memory now, and found there.
    assert len(fleet.b.resident["CPU"]) == BLOCKS
    assert matches(fleet.b, tokens) == [BLOCKS, BLOCKS]
    assert fleet.b.events.llmd.held("STORAGE") == set()


def test_tokens_of_two_scopes_have_one_key_with_routers(fleet, draw):
    """As `docs/routing.md` says: a hint may be wrong, and what is read is not."""
    tokens = draw()
    fleet.a.run(ask(tokens, org="acme"))
    (answer,) = fleet.a.run(ask(tokens, org="zeta"))
    assert answer.read == 0
    wait_until(
        lambda: fleet.a.events.read() is not None and matches(fleet.a, tokens) == [BLOCKS] * 2
    )
    assert len(fleet.a.engine.call("event_hashes")["GPU"]) == 2 * BLOCKS


def test_vllms_own_count_by_source_agrees(fleet, draw):
    pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="vLLM has it from 0.32 on")

    def counted(worker):
        sources = {
            source: worker.engine.call("counter", "vllm:prompt_tokens_cached_by_source", source)
            for source in ("device", "host", "external_unspecified", "disk", "p2p")
        }
        ours = {
            outcome: worker.engine.call("counter", "cachescope_prompt_tokens", f"read_{outcome}")
            for outcome in ("device", "cpu", "redis")
        }
        return sources, ours

    tokens = draw()
    before = [counted(worker) for worker in (fleet.a, fleet.b)]
    fleet.a.run(ask(tokens))
    fleet.a.run(ask(tokens))
    wait_until(lambda: len(fleet.stored()) == BLOCKS)
    fleet.b.run(ask(tokens))
    fleet.a.engine.call("empty_device")
    fleet.a.run(ask(tokens))
    grown = []
    for worker, earlier in zip((fleet.a, fleet.b), before, strict=True):
        now = counted(worker)
        grown.append([[now[i][k] - earlier[i][k] for k in now[i]] for i in (0, 1)])
    whole = BLOCKS * BLOCK
    assert grown == [
        [[whole, whole, 0, 0, 0], [whole, whole, 0]],
        [[0, 0, whole, 0, 0], [0, 0, whole]],
    ]
