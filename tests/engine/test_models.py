"""Every kind of model: what is read, created, kept and told is right for all ways of keeping KV."""

import random
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256

import pytest

from tests.engine.engine import Answer, Ask, Cut, draw_tokens, org_plan, plan, sealed
from tests.engine.kinds import KINDS, Kind
from tests.redis.replica import Replica
from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

FLOOD = "name:flood"
"""The one organisation that has a quota."""

QUOTA_BLOCKS = 40
CPU_CHUNKS = 400


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    if not request.param.runs:
        pytest.skip("vLLM does not cache prefixes of this kind on this machine")
    return request.param


@pytest.fixture(scope="module")
def replica(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    quota = {"orgs": {"flood": {"quota": QUOTA_BLOCKS * kind.block_bytes}}}
    config = {
        "cpu_bytes": CPU_CHUNKS * kind.block_bytes,
        "quotas": {"device": quota},
        "tenants": {sha256(b"a key").hexdigest(): "flood"},
    }
    options = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 400, **kind.options}
    replica = Replica(kind.build(), tmp_path_factory.mktemp(kind.name), config, **options)
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture
def engine(replica: Replica) -> Replica:
    replica.call("empty")
    return replica


def ask(engine: Replica, org: str, tokens: list[int], *cuts: Cut) -> Answer:
    """Have ``org`` ask for ``tokens``; make sure that the counts are vLLM's own."""
    asked = plan(Caller(org), *cuts) if cuts else org_plan(org, tokens)
    (answer,) = engine.run(Ask(tokens, sealed(asked)))
    assert answer.report is not None
    assert answer.report.read_tokens == answer.read
    assert answer.outcome("created") == answer.created
    return answer


def explained(answer: Answer, shared: int) -> bool:
    """Whether each of the first ``shared`` tokens was read, or has a cause."""
    assert answer.report is not None
    return answer.read + sum(miss.tokens for miss in answer.report.misses) >= shared


def test_what_is_read_and_created(engine: Replica, kind: Kind, chance: random.Random) -> None:
    tokens = draw_tokens(chance, 1000)
    whole = 1000 // kind.block * kind.block
    expected = engine.call("uncached", tokens)

    cold = ask(engine, "acme", tokens)
    assert (cold.read, cold.created) == (0, whole)
    assert cold.report.misses == ()
    warm = ask(engine, "acme", tokens)
    assert (warm.outcome("read_device"), warm.created) == (whole, 0)
    engine.call("empty_device")
    from_cpu = ask(engine, "acme", tokens)
    assert (from_cpu.outcome("read_cpu"), from_cpu.created) == (whole, 0)
    assert cold.tokens == expected
    assert warm.tokens == from_cpu.tokens
    assert warm.tokens == expected or not kind.is_exact


def test_nobody_else_reads_it(engine: Replica, kind: Kind, chance: random.Random) -> None:
    tokens = draw_tokens(chance, 1000)
    ask(engine, "acme", tokens)
    assert ask(engine, "zeta", tokens).read == 0
    engine.call("empty_device")
    assert ask(engine, "other", tokens).read == 0


def test_a_marked_head_is_shared_from_the_first_request_on(
    engine: Replica, kind: Kind, chance: random.Random
) -> None:
    head = draw_tokens(chance, 2 * kind.block + 10)

    def asked(org: str) -> Answer:
        tokens = head + draw_tokens(chance, 2 * kind.block)
        return ask(
            engine, org, tokens, (len(head), Scope.GLOBAL, 3600), (len(tokens), Scope.ORG, 300)
        )

    asked("acme")
    assert asked("zeta").read == 2 * kind.block
    engine.call("empty_device")
    assert asked("other").outcome("read_cpu") == 2 * kind.block
    engine.call("advance", 300)
    assert asked("acme").read == 2 * kind.block


def test_an_unmarked_head_is_no_riddle(engine: Replica, kind: Kind, chance: random.Random) -> None:
    """A model that keeps its state where prompts end cannot resume one in the middle of another;
    vLLM keeps the state there from the second such prompt on."""
    head = draw_tokens(chance, 2 * kind.block)

    def asked() -> Answer:
        return ask(engine, "acme", head + draw_tokens(chance, 2 * kind.block))

    asked()
    second = asked()
    if kind.has_checkpoints:
        assert second.read == 0
        (miss,) = second.report.misses
        assert (miss.cause, miss.tokens) == (MissCause.NO_CHECKPOINT, len(head))
    else:
        assert second.read == len(head)
    assert asked().read == len(head)


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_it_expires(engine: Replica, kind: Kind, chance: random.Random, tier: str) -> None:
    tokens = draw_tokens(chance, 1000)
    ask(engine, "acme", tokens)
    if tier == "cpu":
        engine.call("empty_device")
    engine.call("advance", 300)
    late = ask(engine, "acme", tokens)
    assert late.read == 0
    (miss,) = late.report.misses
    assert (miss.cause, miss.ttl_s) == (MissCause.EXPIRED, 300)
    assert explained(late, 1000 // kind.block * kind.block)
    engine.call("advance", 300)
    engine.call("command_sweep")
    assert engine.call("resident") == {}
    assert engine.call("device_bytes") == 0


def test_bytes_and_quotas_of_the_device(engine: Replica, kind: Kind, chance: random.Random) -> None:

    def used() -> int:
        return next(t for t in engine.call("command_health") if t["name"] == "device")["used_bytes"]

    ask(engine, "acme", draw_tokens(chance, 1000))
    assert used() == engine.call("device_bytes") > 0
    assert engine.call("device_bytes") % kind.block_bytes == 0
    engine.call("empty")
    quota = QUOTA_BLOCKS * kind.block_bytes
    flood = [draw_tokens(chance, 1000) for _ in range(16)]
    for tokens in flood:
        ask(engine, FLOOD, tokens)
        assert used() == engine.call("device_bytes") <= quota
    assert used() > quota // 2
    newest = ask(engine, FLOOD, flood[-1])
    assert newest.outcome("read_device") == 1000 // kind.block * kind.block


def test_random_prompts(engine: Replica, kind: Kind, chance: random.Random) -> None:
    """Whatever is shared and kept, answers are exact and what was not read is explained."""
    begin = draw_tokens(chance, 700)
    read = 0
    for _ in range(12):
        end = chance.randrange(1, len(begin))
        tokens = begin[:end] + draw_tokens(chance, chance.randrange(1, 300))
        expected = engine.call("uncached", tokens)
        if chance.random() < 0.3:
            engine.call("empty_device")
        cuts: list[Cut] = [(len(tokens), Scope.ORG, 300)]
        if chance.random() < 0.7:
            cuts.insert(0, (end, Scope.GLOBAL, 3600))
        (answer,) = engine.run(Ask(tokens, sealed(plan(Caller("acme"), *cuts))))
        assert answer.tokens == expected or (answer.read and not kind.is_exact)
        read += answer.read
    assert read > 0


def test_the_counts_of_an_hour_add_up(engine: Replica, kind: Kind, chance: random.Random) -> None:
    """Whatever is asked at once, again and too late: the reports, the metrics and vLLM agree."""

    def counted() -> tuple[int, ...]:
        outcomes = ("read_device", "read_cpu", "created", "uncached")
        return tuple(
            int(engine.call("counter", "cachescope_prompt_tokens", outcome)) for outcome in outcomes
        )

    heads = [draw_tokens(chance, length) for length in (100, 3 * kind.block + 50)]
    asked = [head + draw_tokens(chance, chance.randrange(1, 600)) for head in heads * 3]
    before, told = counted(), Counter[str]()
    for _ in range(12):
        engine.call("advance", chance.choice([1, 200, 299, 700]))
        if chance.random() < 0.3:
            engine.call("empty_device")
        prompts = chance.choices(asked, k=3)
        asks = [Ask(tokens, sealed(org_plan("acme", tokens))) for tokens in prompts]
        for tokens, answer in zip(prompts, engine.run(*asks), strict=True):
            assert (answer.read, answer.created) == (
                answer.report.read_tokens,
                answer.outcome("created"),
            )
            told.update(prompt=len(tokens), read=answer.read, created=answer.created)
    engine.call("command_sweep")
    device, cpu, created, uncached = (
        now - then for now, then in zip(counted(), before, strict=True)
    )
    assert (device + cpu, created) == (told["read"], told["created"])
    assert device + cpu + created + uncached == told["prompt"]
    assert device and cpu and created
