"""Where a block takes room once, on the device or in memory: both together hold more, answers stay
exact, and nothing that was purged, has expired or is another's is among what is kept."""

import random
from collections.abc import Iterator
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import (
    BLOCK,
    BLOCK_BYTES,
    OWNERS,
    Ask,
    draw_prompt,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from tests.redis.replica import Replica
from tests.redis.test_burst import RedisBehind
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.tenancy.scope import Caller

pytestmark = pytest.mark.engine

DEVICE_BLOCKS, CHUNKS = 40, 40
SMALL, QUOTA = "name:small", 12
"""An organisation, and how many blocks it may have in memory."""

PROMPTS, LENGTH = 7, 10
"""More blocks than either tier holds, and fewer than both."""


def start(tmp_path_factory: Any, name: str, device: str = "lru", **config: Any) -> Replica:
    config["eviction"] = {"hierarchy": "exclusive", "device": device}
    return Replica(
        build(MODELS / "tiny", TINY),
        tmp_path_factory.mktemp(name),
        config,
        cpu_chunks=CHUNKS,
        num_gpu_blocks_override=DEVICE_BLOCKS + 1,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[Replica]:
    """Without remote tiers: memory gets what the device evicts, once it is full."""
    orgs = {"small": {"quota": QUOTA * BLOCK_BYTES}}
    quotas = {"cpu": {"quota": 100 * BLOCK_BYTES, "orgs": orgs}}
    tenants = {sha256(b"a key").hexdigest(): "small"}
    replica = start(tmp_path_factory, "exclusive", quotas=quotas, tenants=tenants)
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture(scope="module")
def behind(tmp_path_factory) -> Iterator[RedisBehind]:
    behind = RedisBehind(tmp_path_factory.mktemp("behind"))
    yield behind
    behind.close()


@pytest.fixture(scope="module")
def with_redis(tmp_path_factory, behind) -> Iterator[Replica]:
    """With Redis, which gets what is computed at once, by way of the memory; and a device that
    evicts by what it has learned."""
    replica = start(tmp_path_factory, "exclusive with redis", "learned", tiers=[behind.tier])
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture(params=["alone", "with_redis"])
def engine(request) -> Replica:
    replica: Replica = request.getfixturevalue(request.param)
    if request.param == "with_redis":
        request.getfixturevalue("behind").clear()
    replica.call("empty")
    return replica


# What runs in the engine's process.


def check(engine: Any) -> tuple[int, int, int]:
    """Check that order, device and memory agree; return how many blocks are on the device, in
    memory, and on both."""
    from vllm_cachescope.connectors.vllm.engine.tiers.copies import ON_DEVICE

    # What is over becomes known with the next step.
    tokens = draw_tokens(random.Random("another"), BLOCK // 2)
    engine.ask(tokens, org_plan("another", tokens))
    policy = engine.connector.cachescope.local._cpu._policy  # noqa: SLF001
    order, chunks = policy._order, policy._chunks  # noqa: SLF001
    pool = engine.scheduler.kv_cache_manager.block_pool
    device = {block.block_hash for block in pool.blocks if block.block_hash is not None}
    for key, run in order.runs.items():
        assert key in device or key in chunks
        assert run.is_open or (run.place.org == ON_DEVICE) == (key in device)
    assert set(policy._copies._keys) <= chunks.keys() & device  # noqa: SLF001
    assert chunks.keys() <= order.runs.keys() | device
    assert not engine.connector._demotions.is_active  # noqa: SLF001
    free = engine.connector.connector_scheduler.manager.primary_tier._get_num_free_chunks()  # noqa: SLF001
    assert free + len(chunks) == CHUNKS
    return len(device), len(chunks), len(chunks.keys() & device)


def in_memory(engine: Any, org: str) -> int:
    """Return how many chunks of an organisation memory holds."""
    policy = engine.connector.cachescope.local._cpu._policy  # noqa: SLF001
    prefix = OWNERS.prefix(org)
    entries = (policy._ledger.get(key) for key in policy._chunks)  # noqa: SLF001
    return sum(entry is not None and entry.owner.startswith(prefix) for entry in entries)


def reset_with_some_under_way(engine: Any, several: list[list[int]]) -> int:
    """Empty all tiers before it is heard that copies are done; return how many there were."""
    demotions, late = engine.connector._demotions, dict[int, int]()  # noqa: SLF001
    take_completed = demotions.take_completed

    def hold(meta: Any) -> None:
        for job_id in demotions._jobs.keys() & meta.completed_jobs.keys():  # noqa: SLF001
            late[job_id] = meta.completed_jobs.pop(job_id)

    demotions.take_completed = hold
    for tokens in several:
        engine.ask(tokens, org_plan("acme", tokens))
    engine.empty()
    demotions.take_completed = take_completed
    found = len(late)
    take_completed(SimpleNamespace(completed_jobs=late))
    return found


# The tests.


def ask(engine: Replica, tokens: list[int], org: str = "acme", ttl_s: int = 300) -> Any:
    (answer,) = engine.run(Ask(tokens, sealed(org_plan(org, tokens, ttl_s))))
    return answer


def prompts(seed: int, count: int = PROMPTS) -> list[list[int]]:
    chance = random.Random(seed)
    return [draw_tokens(chance, LENGTH * BLOCK + 5) for _ in range(count)]


def test_device_and_memory_hold_as_much_as_both_have(engine: Replica) -> None:
    several = prompts(1)
    want = [engine.call("uncached", tokens) for tokens in several]
    engine.call("empty")
    for turn in range(4):
        engine.call("advance", 1.0)
        answers = [ask(engine, tokens) for tokens in several]
        assert [answer.tokens for answer in answers] == want
        read = sum(answer.read for answer in answers) // BLOCK
        assert read == (PROMPTS * LENGTH if turn else 0)
    on_device, in_chunks, twice = engine.call(check)
    assert on_device + in_chunks - twice >= PROMPTS * LENGTH


def test_whatever_is_asked_answers_are_exact_and_tiers_agree(engine: Replica) -> None:
    chance = random.Random(2)
    earlier: list[tuple[list[int], list[Any]]] = []
    read = 0
    for number in range(60):
        engine.call("advance", chance.choice([0.1, 5.0, 5.0, 150.0]))
        asks = []
        for _ in range(chance.choice([1, 1, 3])):
            tokens, cuts = draw_prompt(chance, earlier, 1500)
            caller = Caller(chance.choice("ab"), chance.choice("st"))
            asks.append(Ask(tokens, sealed(plan(caller, *cuts))))
        answers = engine.run(*asks)
        read += sum(answer.read for answer in answers)
        if number % 6 == 0:
            (again,) = engine.run(Ask(asks[0].tokens, {"cachescope": {}}))
            assert again.read == 0
            assert again.tokens == answers[0].tokens
        if number % 10 == 3:
            engine.call(check)
        if number == 25:
            engine.call("empty_device")
        if number == 40:
            engine.call("command_purge", OWNERS.prefix("a"), f"purge {read}")
    assert read > 20 * BLOCK
    engine.call(check)


def test_what_was_purged_or_has_expired_is_not_kept_when_the_device_evicts_it(
    alone: Replica,
) -> None:
    (doomed,) = prompts(3, 1)
    for end in ("purge", "expiry"):
        alone.call("empty")
        ask(alone, doomed, "doomed", ttl_s=300)
        if end == "purge":
            alone.call("command_purge", OWNERS.prefix("doomed"), "purge of doomed")
        else:
            alone.call("advance", 301.0)
        for tokens in prompts(4, 8):
            ask(alone, tokens)
        assert alone.call(in_memory, "doomed") == 0
        assert ask(alone, doomed, "doomed").read == 0
        alone.call(check)


def test_all_tiers_may_be_emptied_while_copies_are_under_way(alone: Replica) -> None:
    alone.call("empty")
    several = prompts(9, 9)
    assert alone.call(reset_with_some_under_way, several) > 0
    alone.call(check)
    assert ask(alone, several[0]).read == 0
    assert ask(alone, several[0]).read == LENGTH * BLOCK


def test_a_block_that_the_device_holds_twice_may_be_evicted_twice_at_once(engine: Replica) -> None:
    # vLLM computes the last token anew, in another block than the one that is there.
    chance = random.Random(10)
    tokens = draw_tokens(chance, 3 * BLOCK)
    want = ask(engine, tokens, "acme").tokens
    for other in prompts(11, 5):
        ask(engine, other, "globex")
    # From memory, which keeps its copy; then the last block once more from there each time.
    for _ in range(6):
        assert ask(engine, tokens, "acme").read >= 2 * BLOCK
    for _ in range(2):
        ask(engine, draw_tokens(chance, 30 * BLOCK), "globex")
    engine.call(check)
    # Whether it is still there is the policy's choice.
    assert ask(engine, tokens, "acme").tokens == want


def test_what_is_anothers_is_not_read_wherever_it_lies(engine: Replica) -> None:
    several = prompts(5)
    for tokens in several:
        ask(engine, tokens, "acme")
    for tokens in several[::-1]:
        assert ask(engine, tokens, "globex").read == 0


def test_an_organisation_keeps_within_its_quota(alone: Replica) -> None:
    alone.call("empty")
    for tokens in prompts(6, 6):
        ask(alone, tokens, SMALL)
        alone.call(check)
        assert alone.call(in_memory, SMALL) <= QUOTA + DEVICE_BLOCKS
    for tokens in prompts(7, 5):
        ask(alone, tokens, "acme")
    alone.call(check)
    assert alone.call(in_memory, SMALL) <= QUOTA


def test_redis_has_all_of_it_at_once_and_each_block_once(with_redis: Replica, behind) -> None:
    behind.clear()
    with_redis.call("empty")
    several = prompts(8)
    for tokens in several:
        ask(with_redis, tokens)
    assert behind.blocks() == PROMPTS * LENGTH
    written = behind.server.client.info("commandstats").get("cmdstat_set", {}).get("calls", 0)
    for tokens in several * 2:
        assert ask(with_redis, tokens).read == LENGTH * BLOCK
    after = behind.server.client.info("commandstats").get("cmdstat_set", {}).get("calls", 0)
    assert after == written
