"""A burst of returning users: what a remote tier holds is read and not computed again, through a
CPU tier and a device that hold fewer prompts; and every answer is that of a cold run."""

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from demo.model import MODELS, TINY, build
from tests.disk.side import files
from tests.engine.engine import BLOCK, BLOCK_BYTES, Answer, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.metrics import PROMOTION_WAIT_SECONDS

pytestmark = pytest.mark.engine

BLOCKS = 8
"""Blocks per prompt."""
CPU_CHUNKS = 12
USERS = 6


class RedisBehind:
    """A Redis behind the CPU tier."""

    name = "redis"

    def __init__(self, directory: Path) -> None:
        self.server = RedisServer(directory)
        self.tier: dict[str, Any] = {"type": "redis", "url": self.server.url}

    def blocks(self) -> int:
        return len(entries(self.server))

    def clear(self) -> None:
        self.server.client.flushall()

    def close(self) -> None:
        self.server.close()


class FilesBehind:
    """LMCache's files behind the CPU tier."""

    name = "lmcache"

    def __init__(self, directory: Path) -> None:
        self._files = directory / "files"
        adapter = {"type": "fs", "base_path": str(self._files)}
        self.tier: dict[str, Any] = {"type": "lmcache", "adapter": adapter}

    def blocks(self) -> int:
        return sum(1 for _ in self._files.glob("*0000000076@*.data"))

    def clear(self) -> None:
        for file in self._files.glob("*"):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        pass


class DiskBehind:
    """A directory behind the CPU tier."""

    name = "disk"

    def __init__(self, directory: Path) -> None:
        self._place = directory / "disk"
        self.tier: dict[str, Any] = {"type": "disk", "path": str(self._place), "capacity": "1GiB"}

    def blocks(self) -> int:
        return len(files(self._place))

    def clear(self) -> None:
        # No test has another's prompts.
        pass

    def close(self) -> None:
        pass


Behind = RedisBehind | FilesBehind | DiskBehind


@pytest.fixture(
    scope="module",
    params=[
        RedisBehind,
        pytest.param(FilesBehind, marks=pytest.mark.slow),
        pytest.param(DiskBehind, marks=pytest.mark.slow),
    ],
)
def behind(request, tmp_path_factory) -> Iterator[Behind]:
    behind: Behind = request.param(tmp_path_factory.mktemp("behind"))
    yield behind
    behind.close()


@pytest.fixture(scope="module")
def replica(tmp_path_factory, behind) -> Iterator[Replica]:
    replica = Replica(
        build(MODELS / "tiny", TINY),
        tmp_path_factory.mktemp("burst"),
        {
            "tiers": [{**behind.tier, "load_deadline": "3s", "first_probe": "50ms"}],
            "tenants": {sha256(b"a key").hexdigest(): "greedy"},
            "quotas": {"cpu": {"orgs": {"greedy": {"quota": 9 * BLOCK_BYTES}}}},
        },
        cpu_chunks=CPU_CHUNKS,
        # Four prompts, and the least that the engine starts with: the device is full as well.
        num_gpu_blocks_override=34,
    )
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture
def engine(replica: Replica, behind: Behind) -> Replica:
    behind.clear()
    replica.call("empty")
    # The tests' model computes faster than anything loads: no share of that would be waited for.
    replica.call(set_bounds, 10.0, 1e9)
    assert replica.call(held) == 0
    return replica


def held(engine: Any) -> int:
    """Return how many keys the engine holds in its CPU tier for promotions."""
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    return len(policy._held)  # noqa: SLF001


def waits(engine: Any) -> dict[str, float]:
    """Return how many waits have ended so far, by outcome."""
    from tests.engine.samples import samples

    counted = samples(PROMOTION_WAIT_SECONDS, "_count")
    return {outcome: count for (outcome,), count in counted.items()}


def waited_seconds(engine: Any) -> float:
    """Return how long those waited that got room in time, as the histogram has it."""
    from tests.engine.samples import samples

    waited = samples(PROMOTION_WAIT_SECONDS, "_sum")["waited",]
    assert samples(PROMOTION_WAIT_SECONDS, "_bucket")
    return waited


def grown(engine: Replica, before: dict[str, float]) -> dict[str, float]:
    now = engine.call(waits)
    return {key: now[key] - before.get(key, 0) for key in now if now[key] > before.get(key, 0)}


def asks(prompts: list[list[int]], *orgs: str) -> list[Ask]:
    names = orgs or ("acme",)
    return [
        Ask(tokens, sealed(org_plan(names[i % len(names)], tokens)))
        for i, tokens in enumerate(prompts)
    ]


def stored(engine: Replica, behind: Behind, prompts: list[list[int]], *orgs: str) -> list[Any]:
    """Have prompts computed, and everything forgotten but what is behind; return the answers."""
    answers = []
    whole: set[tuple[int, ...]] = set()
    before = behind.blocks()

    def are_stored() -> bool:
        return behind.blocks() - before >= len(whole)

    for ask in asks(prompts, *orgs):
        answers += [answer.tokens for answer in engine.run(ask)]
        whole |= {tuple(ask.tokens[:end]) for end in range(BLOCK, len(ask.tokens) + 1, BLOCK)}
        wait_until(are_stored)
    engine.call("empty")
    return answers


def draw(chance: random.Random, count: int = USERS, blocks: int = BLOCKS) -> list[list[int]]:
    return [draw_tokens(chance, blocks * BLOCK + 5) for _ in range(count)]


@pytest.mark.parametrize("orgs", [("acme",), ("acme", "other", "third")])
def test_all_of_a_burst_is_read(engine, behind, chance, orgs):
    prompts = draw(chance)
    cold = stored(engine, behind, prompts, *orgs)
    before = engine.call(waits)
    answers: list[Answer] = engine.run(*asks(prompts, *orgs))
    assert [answer.outcome(f"read_{behind.name}") for answer in answers] == [BLOCKS * BLOCK] * USERS
    assert [answer.tokens for answer in answers] == cold
    assert grown(engine, before) == {"at_once": 1, "waited": USERS - 1}
    assert engine.call(waited_seconds) > 0
    waited_s = [answer.report.memory_wait_s for answer in answers if answer.report]
    assert waited_s[0] is None and all(0 < seconds < 10 for seconds in waited_s[1:])
    assert engine.call(held) == 0


def test_one_prompt_after_the_other_does_not_wait(engine, behind, chance):
    prompts = draw(chance, 3)
    cold = stored(engine, behind, prompts)
    before = engine.call(waits)
    for ask, tokens in zip(asks(prompts), cold, strict=True):
        (answer,) = engine.run(ask)
        assert answer.outcome(f"read_{behind.name}") == BLOCKS * BLOCK and answer.tokens == tokens
    assert grown(engine, before) == {"at_once": 3}


def test_prompts_that_share_their_beginning_need_its_room_once(engine, behind, chance):
    begin = draw_tokens(chance, 6 * BLOCK)
    prompts = [begin + draw_tokens(chance, 2 * BLOCK + 5) for _ in range(USERS)]
    cold = stored(engine, behind, prompts)
    answers = engine.run(*asks(prompts))
    assert [answer.tokens for answer in answers] == cold
    assert all(answer.read == BLOCKS * BLOCK for answer in answers)


def test_a_burst_delays_another_organisation_by_one_turn(engine, behind, chance):
    prompts = draw(chance)
    first, last = asks(prompts[:-1]), asks(prompts[-1:], "name:greedy")
    cold = stored(engine, behind, prompts[:-1]) + stored(
        engine, behind, prompts[-1:], "name:greedy"
    )
    answers, order = engine.call(order_of, [*first, *last])
    assert [answer.tokens for answer in answers] == cold
    assert [answer.read for answer in answers] == [BLOCKS * BLOCK] * USERS
    assert order == [0, USERS - 1, *range(1, USERS - 1)]


def order_of(engine: Any, burst: list[Ask]) -> tuple[list[Answer], list[int]]:
    """Return the answers, and in which order their requests got room."""
    promotions = engine.connector._promotions  # noqa: SLF001
    order: list[str] = []
    go = promotions._go  # noqa: SLF001

    def go_and_note(request_id: str) -> None:
        order.append(request_id)
        go(request_id)

    promotions._go = go_and_note  # noqa: SLF001
    try:
        ids = [engine.add(ask) for ask in burst]
        while engine.step():
            pass
    finally:
        del promotions._go  # noqa: SLF001
    places = {request_id: place for place, request_id in enumerate(ids)}
    # vLLM adds something of its own to the ids.
    return [engine.answer(one) for one in ids], [places[one.partition("-")[0]] for one in order]


def test_who_needs_no_promotion_does_not_wait(engine, behind, chance):
    prompts = draw(chance)
    stored(engine, behind, prompts)
    new = Ask(draw_tokens(chance, 50), sealed(org_plan("acme", [0] * 50)), max_tokens=1)
    steps = engine.call(steps_until_done, asks(prompts), new)
    # One to be computed in; one more if the first step's budget of tokens was used.
    assert steps <= 3


def steps_until_done(engine: Any, burst: list[Ask], last: Ask) -> int:
    """Return how many steps a request takes that comes after a burst; then end the burst."""
    ids = [engine.add(ask) for ask in burst]
    engine.step()
    request_id = engine.add(last)
    steps = 1
    while engine.step() and not engine._answers[request_id].tokens:  # noqa: SLF001
        steps += 1
    while engine.step():
        pass
    for done in (*ids, request_id):
        engine.answer(done)
    return steps


def test_who_has_loaded_waits_as_long_as_a_short_step_for_others_that_load(engine, behind, chance):
    (prompt,) = draw(chance, 1)
    (cold,) = stored(engine, behind, [prompt])
    answer, asked = engine.call(with_company, asks([prompt])[0])
    assert answer.tokens == cold and answer.read == BLOCKS * BLOCK
    assert [may for _, may in asked] == [False] * (len(asked) - 1) + [True]
    assert asked[-1][0] - asked[0][0] >= 0.2 > asked[-2][0] - asked[0][0]
    # Alone it does not wait.
    engine.call("empty")
    answer, asked = engine.call(with_company, asks([prompt])[0], False)
    assert answer.tokens == cold and [may for _, may in asked] == [True]


def with_company(
    engine: Any, ask: Ask, others_load: bool = True
) -> tuple[Answer, list[tuple[float, bool]]]:
    """Return the answer, and when it was asked whether the request may go, and what was said, on an
    engine whose short steps take 0.2 s, beside a load that does not end."""
    connector, rate = engine.connector, engine.connector.cachescope.prefill_rate
    jobs = connector.cachescope.remotes[0].tier._load_jobs  # noqa: SLF001
    company = connector._promotions._company  # noqa: SLF001
    asked: list[tuple[float, bool]] = []
    may_go, known = company.may_go, rate.short_step_s

    def may_go_and_note(request_id: str, now: float, *rest: Any) -> bool:
        asked.append((now, may_go(request_id, now, *rest)))
        return asked[-1][1]

    company.may_go = may_go_and_note
    jobs._nbytes += others_load  # noqa: SLF001
    rate.short_step_s = 0.2
    try:
        request_id = engine.add(ask)
        while engine.step():
            pass
    finally:
        del company.may_go
        jobs._nbytes -= others_load  # noqa: SLF001
        rate.short_step_s = known
    return engine.answer(request_id), asked


def test_what_is_cut_off_holds_up_nobody_and_leaves_nothing(engine, behind, chance):
    prompts = draw(chance)
    cold = stored(engine, behind, prompts)
    before = engine.call(waits)
    answers = engine.call(cut_off, asks(prompts), [0, 2])
    assert [answer.tokens for answer in answers] == [cold[i] for i in (1, 3, 4, 5)]
    assert [answer.read for answer in answers] == [BLOCKS * BLOCK] * 4
    assert grown(engine, before) == {"at_once": 1, "waited": 4, "cut_off": 1}
    assert engine.call(held) == 0


def cut_off(engine: Any, burst: list[Ask], cut: list[int]) -> list[Answer]:
    """Put a burst to the engine, and give up some of it: what is being promoted, and what waits."""
    ids = [engine.add(ask) for ask in burst]
    promotions = engine.connector._promotions  # noqa: SLF001
    while not promotions._queue.waiting:  # noqa: SLF001
        engine.step()
    for number in cut:
        engine.abort(ids[number])
    while engine.step():
        pass
    return [engine.answer(ids[i]) for i in range(len(ids)) if i not in cut]


def test_a_redis_that_dies_meanwhile_costs_the_hits_and_not_the_requests(engine, behind, chance):
    if not isinstance(behind, RedisBehind):
        pytest.skip("files do not die")
    prompts = draw(chance)
    cold = stored(engine, behind, prompts)
    before = engine.call(waits)
    engine.call(begin_burst, asks(prompts))
    behind.server.kill()
    try:
        answers = engine.call(end_burst)
    finally:
        behind.server.start()
        wait_until(lambda: engine.call("command_health")[-1]["up"])
    assert [answer.tokens for answer in answers] == cold
    ended = grown(engine, before)
    assert ended.pop("at_once") == 1 and sum(ended.values()) == USERS - 1
    assert engine.call(held) == 0


def begin_burst(engine: Any, burst: list[Ask]) -> None:
    """Put a burst to the engine, and step until some of it waits."""
    engine.burst = [engine.add(ask) for ask in burst]
    while not engine.connector._promotions._queue.waiting:  # noqa: SLF001
        engine.step()


def end_burst(engine: Any) -> list[Answer]:
    """Return the answers to what `begin_burst` has begun."""
    while engine.step():
        pass
    return [engine.answer(request_id) for request_id in engine.burst]


LONG = 2 * CPU_CHUNKS + 4
"""Blocks of a prompt that the CPU tier does not hold, and the device does."""


def long_stored(engine: Replica, behind: Behind, chance: random.Random) -> tuple[list[int], Any]:
    """Have a long prompt stored; return it, and its answer."""
    (long,) = draw(chance, 1, LONG)
    before, (cold,) = behind.blocks(), engine.run(*asks([long]))
    # In several goes: chunks that are being stored stay in the CPU tier, and others find no room.
    for _ in range(8):
        wait_until(lambda: engine.call("command_health")[-1]["storing_bytes"] == 0)
        engine.call("empty")
        if behind.blocks() >= before + LONG:
            return long, cold.tokens
        engine.run(*asks([long]))
    raise AssertionError("it is not stored")


def test_a_prompt_longer_than_the_cpu_tier_is_read_in_parts(engine, behind, chance):
    long, cold = long_stored(engine, behind, chance)
    before = engine.call(waits)
    (answer,) = engine.run(*asks([long]))
    assert answer.tokens == cold
    assert answer.outcome(f"read_{behind.name}") == LONG * BLOCK
    assert answer.report is not None and not answer.report.misses
    # Three parts of half of the tier, and what the whole of it holds.
    assert grown(engine, before) == {"at_once": 4}
    assert engine.call(held) == 0
    # What it has left on the device is right.
    (again,) = engine.run(*asks([long]))
    assert again.tokens == cold and again.outcome("read_device") == LONG * BLOCK


def test_long_prompts_and_others_come_back_together(engine, behind, chance):
    long, cold = long_stored(engine, behind, chance)
    other, other_cold = long_stored(engine, behind, chance)
    prompts = draw(chance, 2)
    colds = stored(engine, behind, prompts)
    answers = engine.run(*asks([long, prompts[0], other, prompts[1]]))
    assert [answer.tokens for answer in answers] == [cold, colds[0], other_cold, colds[1]]
    assert answers[0].read == LONG * BLOCK and answers[1].read == BLOCKS * BLOCK
    # On a device that holds one of the two, a part may be evicted before the next one comes.
    assert answers[2].read >= CPU_CHUNKS // 2 * BLOCK
    assert engine.call(held) == 0


def between_parts(engine: Any, ask: Ask) -> str:
    """Put a long prompt to the engine, and step until its first part is on the device; return the
    request's id."""
    request_id = engine.add(ask)
    streams = engine.connector._streams  # noqa: SLF001
    while not streams._between:  # noqa: SLF001
        engine.step()
    return request_id


def cut_off_between_parts(engine: Any, ask: Ask) -> None:
    engine.abort(between_parts(engine, ask))
    while engine.step():
        pass


def test_what_is_cut_off_between_two_parts_leaves_nothing(engine, behind, chance):
    long, cold = long_stored(engine, behind, chance)
    engine.call(cut_off_between_parts, asks([long])[0])
    assert engine.call(held) == 0
    assert engine.call(in_use) == 0
    (answer,) = engine.run(*asks([long]))
    assert answer.tokens == cold and answer.read == LONG * BLOCK


def in_use(engine: Any) -> int:
    """Return how many of the device's blocks requests have, and how many requests read in
    parts."""
    pool = engine.connector.cachescope.local._device._pool  # noqa: SLF001
    free = pool.get_num_free_blocks()
    promotions, streams = engine.connector._promotions, engine.connector._streams  # noqa: SLF001
    return pool.num_gpu_blocks - 1 - free + len(promotions._parts) + len(streams._between)  # noqa: SLF001


def begin_long(engine: Any, ask: Ask) -> None:
    engine.burst = [between_parts(engine, ask)]


def lose_the_device(engine: Any) -> None:
    """Evict what requests have left on the device."""
    device = engine.connector.cachescope.local._device  # noqa: SLF001
    device.evict(list(engine.connector.cachescope.ledger._entries))  # noqa: SLF001


def test_a_part_that_the_device_loses_is_computed(engine, behind, chance):
    long, cold = long_stored(engine, behind, chance)
    engine.call(begin_long, asks([long])[0])
    engine.call(lose_the_device)
    (answer,) = engine.call(end_burst)
    assert answer.tokens == cold
    assert engine.call(in_use) == 0 and engine.call(held) == 0


def test_a_tier_that_dies_between_two_parts_costs_the_rest(engine, behind, chance):
    if not isinstance(behind, RedisBehind):
        pytest.skip("files do not die")
    long, cold = long_stored(engine, behind, chance)
    engine.call(begin_long, asks([long])[0])
    behind.server.kill()
    try:
        (answer,) = engine.call(end_burst)
    finally:
        behind.server.start()
        wait_until(lambda: engine.call("command_health")[-1]["up"])
    assert answer.tokens == cold
    assert CPU_CHUNKS // 2 * BLOCK <= answer.read < LONG * BLOCK
    assert engine.call(in_use) == 0 and engine.call(held) == 0


def test_whose_next_part_finds_no_room_in_time_computes_the_rest(engine, behind, chance):
    long, cold = long_stored(engine, behind, chance)
    engine.call(begin_long, asks([long])[0])
    engine.call(set_bounds, 0.0, 1.0)
    engine.call(crowd)
    try:
        (answer,) = engine.call(end_burst)
    finally:
        engine.call(disperse)
    assert answer.tokens == cold
    assert CPU_CHUNKS // 2 * BLOCK <= answer.read < LONG * BLOCK
    assert answer.report is not None
    (miss,) = answer.report.misses
    assert miss.tokens == LONG * BLOCK - answer.read
    assert miss.detail == "no room in the CPU tier within 0 ms"


def crowd(engine: Any) -> None:
    """Keep everything that the CPU tier holds."""
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    engine.kept = list(policy._chunks)  # noqa: SLF001
    policy.hold(engine.kept)


def disperse(engine: Any) -> None:
    policy = engine.connector.connector_scheduler.manager.primary_tier._policy  # noqa: SLF001
    policy.release(engine.kept)


def test_promotions_keep_to_an_organisations_quota(engine, behind, chance):
    """The CPU tier has room for three of these, and the quota for two."""
    prompts = draw(chance, 3, 4)
    cold = stored(engine, behind, prompts, "name:greedy")
    before = engine.call(waits)
    answers = engine.run(*asks(prompts, "name:greedy"))
    assert [answer.tokens for answer in answers] == cold
    assert [answer.outcome(f"read_{behind.name}") for answer in answers] == [4 * BLOCK] * 3
    assert grown(engine, before) == {"at_once": 2, "waited": 1}


def test_who_finds_no_room_in_time_computes_and_the_report_says_so(engine, behind, chance):
    prompts = draw(chance, 3)
    cold = stored(engine, behind, prompts)
    before = engine.call(waits)
    engine.call(set_bounds, 0.0, 1.0)
    answers = engine.run(*asks(prompts))
    assert [answer.tokens for answer in answers] == cold
    ended = grown(engine, before)
    assert (ended["at_once"], ended.get("late", 0) + ended.get("turned_away", 0)) == (1, 2)
    late = [answer for answer in answers if answer.read < BLOCKS * BLOCK]
    assert len(late) == 2
    for answer in late:
        assert answer.report is not None
        (miss,) = answer.report.misses
        assert (miss.cause, miss.tier) == ("timed_out", behind.name)
        assert miss.detail == "no room in the CPU tier within 0 ms"


def set_bounds(engine: Any, limit_s: float, share: float) -> None:
    """Let requests wait for so long, and for such a share of what computing takes."""
    queue = engine.connector._promotions._queue  # noqa: SLF001
    queue._limit_s, queue._share = limit_s, share  # noqa: SLF001
