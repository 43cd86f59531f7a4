"""No request reads a block whose scope it does not hold.

A naive model, which knows blocks by their tokens and by who may share them and hashes nothing,
says for each request how much it may read at most, and, where nothing is under pressure, how much
it must read.
"""

import gc
import itertools
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core import kv_cache_utils

from tests.engine.engine import (
    BLOCK,
    CPU_CHUNKS,
    DEVICE_BLOCKS,
    OWNERS,
    SECRET,
    Answer,
    Ask,
    draw_prompt,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.adapters import Adapters
from vllm_cachescope.connectors.vllm.engine.prompt_plans import PlanRules
from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, seal
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

CALLERS = [Caller(org, session) for org in ("acme", "zeta") for session in ("s1", "s2", None)]


@dataclass
class Prompt:
    """A request as the model sees it: its tokens, and for each span who may share it."""

    tokens: list[int]
    plan: Plan
    owners: list[tuple]
    max_tokens: int = 4

    def ask(self) -> Ask:
        return Ask(self.tokens, sealed(self.plan), self.max_tokens)

    def span(self, end: int) -> int:
        """Return the index of the span that a block ending at ``end`` belongs to."""
        ends = [span.end for span in self.plan.spans]
        return next((i for i, at in enumerate(ends) if end <= at), len(ends) - 1)


@dataclass
class Kept:
    """A block that the model expects to be cached."""

    ttl_s: int
    expires_at: float
    tiers: set[str] = field(default_factory=set)


class Model:
    """What may be cached, and for whom."""

    def __init__(self) -> None:
        self._names: dict[tuple, int] = {}
        self.kept: dict[int, Kept] = {}
        self.allocated = 0

    def identities(self, prompt: Prompt, tokens: list[int]) -> list[int]:
        """Return a number for each full block of ``tokens``: the same for equal beginnings that
        are shared by the same callers, and only for those."""
        names, parent = [], 0
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            owner = prompt.owners[prompt.span(start + BLOCK)]
            block = (parent, tuple(tokens[start : start + BLOCK]), owner)
            parent = self._names.setdefault(block, len(self._names) + 1)
            names.append(parent)
        return names

    def expire(self, now: float) -> None:
        self.kept = {name: kept for name, kept in self.kept.items() if kept.expires_at > now}

    def expect(self, prompt: Prompt) -> tuple[int, int]:
        """Return how many blocks must come from the device, and how many from the CPU tier."""
        names = self.identities(prompt, prompt.tokens)

        def run(names, tier):
            held = (name in self.kept and tier in self.kept[name].tiers for name in names)
            return sum(1 for _ in itertools.takewhile(bool, held))

        # vLLM finds a prompt whole in a further tier (and computes its last token again), but
        # never on the device.
        device = run(names[: (len(prompt.tokens) - 1) // BLOCK], "device")
        return device, run(names[device:], "cpu")

    def note(self, prompt: Prompt, answer: Answer, now: float) -> None:
        """A request has run."""
        # The last token generated is in no block.
        tokens = prompt.tokens + answer.tokens[:-1]
        self.allocated += len(tokens) // BLOCK + 1
        offloaded = prompt.plan.covered_tokens // BLOCK
        for i, name in enumerate(self.identities(prompt, tokens)):
            ttl_s = prompt.plan.spans[prompt.span((i + 1) * BLOCK)].ttl_s
            kept = self.kept.setdefault(name, Kept(ttl_s, 0))
            kept.ttl_s = max(kept.ttl_s, ttl_s)
            kept.expires_at = now + kept.ttl_s
            kept.tiers |= {"device", "cpu"} if i < offloaded else {"device"}

    def empty_device(self) -> None:
        self.allocated = 0
        for name, kept in list(self.kept.items()):
            kept.tiers.discard("device")
            if not kept.tiers:
                del self.kept[name]


def draw(chance, earlier, longest, number):
    """Return a random prompt of a random caller."""
    tokens, cuts = draw_prompt(chance, earlier, longest)
    caller = chance.choice(CALLERS)
    owners = {
        Scope.GLOBAL: ("everyone",),
        Scope.ORG: (caller.org,),
        Scope.SESSION: (caller.org, caller.session) if caller.session else ("nobody", number),
    }
    made = plan(caller, *cuts)
    return Prompt(tokens, made, [owners[span.scope] for span in made.spans])


def run_exactly(engine, seed, requests=200):
    """Run a random schedule that fits into every tier; each request must read just what the model
    says. Returns the tokens read, by tier."""
    chance = random.Random(seed)
    model = Model()
    earlier = []
    read = {"device": 0, "cpu": 0}
    for number in range(requests):
        prompt = draw(chance, earlier, 6 * BLOCK, number)
        # Before vLLM has to take a block back, and now and then: what is in memory is needed.
        if model.allocated + len(prompt.tokens) // BLOCK + 2 > DEVICE_BLOCKS or (
            chance.random() < 0.1
        ):
            engine.empty_device()
            model.empty_device()
        if sum("cpu" in kept.tiers for kept in model.kept.values()) > CPU_CHUNKS - 8:
            engine.empty()
            model = Model()
        engine.clock.advance(chance.choice([0] * 9 + [1] * 9 + [100, 299]))
        model.expire(engine.clock())
        device, cpu = model.expect(prompt)
        (answer,) = engine.run(prompt.ask())
        got = answer.outcome("read_device"), answer.outcome("read_cpu")
        assert got == (device * BLOCK, cpu * BLOCK), (
            f"request {number} read {got} tokens and may read {device * BLOCK, cpu * BLOCK}"
        )
        assert answer.read == sum(got)
        read["device"] += got[0]
        read["cpu"] += got[1]
        model.note(prompt, answer, engine.clock())
    return read


def run_under_pressure(engine, seed, rounds=15):
    """Run a random schedule, several requests at once, that overflows every tier. No request may
    read more than what the model says somebody has written for it. Returns the tokens read."""
    chance = random.Random(seed)
    model = Model()
    earlier = []
    read = 0
    for number in range(rounds):
        prompts = [draw(chance, earlier, 2600, (number, i)) for i in range(chance.randrange(1, 9))]
        if chance.random() < 0.2:
            engine.empty_device()
        engine.clock.advance(chance.choice([0, 0, 0, 0, 100, 299]))
        model.expire(engine.clock())
        answers = engine.run(*[prompt.ask() for prompt in prompts])
        written = [set(model.identities(p, p.tokens)) for p in prompts]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # The others of the batch may have written it just before.
            there = set(model.kept).union(*written[:i], *written[i + 1 :])
            allowed = itertools.takewhile(
                there.__contains__, model.identities(prompt, prompt.tokens)
            )
            allowed = sum(1 for _ in allowed) * BLOCK
            assert answer.read <= allowed, (
                f"request {i} of round {number} read {answer.read} tokens and may read {allowed}"
            )
            read += answer.read
        for prompt, answer in zip(prompts, answers, strict=True):
            model.note(prompt, answer, engine.clock())
    return read


@pytest.mark.parametrize("seed", range(4))
def test_each_request_reads_just_what_it_may(engine, seed):
    read = run_exactly(engine, seed)
    assert read["device"] > 10 * BLOCK, "not much of a test"
    assert read["cpu"] > 5 * BLOCK, "not much of a test"


@pytest.mark.parametrize("seed", range(3))
def test_no_request_reads_more_than_it_may(engine, seed):
    assert run_under_pressure(engine, seed) > 20 * BLOCK


@pytest.mark.parametrize("schedule", [run_exactly, run_under_pressure])
def test_a_broken_hook_is_caught(engine, monkeypatch, schedule):
    """The two tests above fail once scope keys no longer enter the hashes."""
    monkeypatch.setattr(
        kv_cache_utils, "generate_block_hash_extra_keys", lambda request, start, end, mm: (None, mm)
    )
    with pytest.raises(AssertionError, match="may read"):
        schedule(engine, seed=0)
    engine.empty()


def forged(plan: Plan) -> list[dict]:
    """Return what a client could send in place of a plan of its own."""
    genuine = seal(plan, SECRET.encode())
    other = org_plan("zeta", [0] * plan.spans[-1].end)
    return [
        {PLAN_KEY: None},
        {PLAN_KEY: seal(plan, b"the secret of somebody else")},
        {PLAN_KEY: {**genuine, "mac": "0" * 32}},
        {PLAN_KEY: {**genuine, "nonce": "another"}},
        {PLAN_KEY: {**seal(other, SECRET.encode()), "spans": genuine["spans"]}},
    ]


def test_a_forged_plan_shares_nothing(engine):
    tokens = draw_tokens(random.Random(9), 700)
    victim = org_plan("acme", tokens)
    engine.ask(tokens, victim)
    engine.run(Ask(tokens, None))
    refused = engine.counter("cachescope_refused_plans")
    for params in forged(victim):
        before = dict(engine.resident())
        (answer,) = engine.run(Ask(tokens, params))
        assert answer.read == 0
        # Nor can the next one read what this one has computed, not even itself again.
        (answer,) = engine.run(Ask(tokens, params))
        assert answer.read == 0
        assert engine.resident()["cpu", 300] == before["cpu", 300], "not worth a copy"
        assert answer.report is None
    assert engine.counter("cachescope_refused_plans") == refused + 2 * len(forged(victim))
    assert engine.ask(tokens, org_plan("acme", tokens)).read == 640


@pytest.mark.parametrize("params", [None, {}, {"max_offload_tokens": 9999}], ids=str)
def test_a_prompt_without_a_plan_is_cached_as_an_anonymous_one(engine, params):
    tokens = draw_tokens(random.Random(12), 700)
    expected = engine.uncached(tokens)
    refused = engine.counter("cachescope_refused_plans")
    (first,), (again,) = engine.run(Ask(tokens, params)), engine.run(Ask(tokens, params))
    assert (first.read, again.read) == (0, 640)
    engine.empty_device()
    (from_cpu,) = engine.run(Ask(tokens, params))
    assert from_cpu.read == 640
    assert first.tokens == again.tokens == from_cpu.tokens == expected
    assert engine.counter("cachescope_refused_plans") == refused
    # Nobody on this way takes the report off the output.
    assert again.report is None
    # As over HTTP without a key: either reads what the other has computed, and nobody else does.
    anonymous = engine.ask(tokens, org_plan(ANONYMOUS, tokens))
    assert anonymous.outcome("read_device") == 640
    assert engine.ask(tokens, org_plan("acme", tokens)).read == 0
    # The end of the prompt, and what was generated behind it, is on the device alone.
    assert engine.resident()["cpu", 300] == 2 * 5
    engine.clock.advance(300)
    assert engine.run(Ask(tokens, params))[0].read == 0


def test_a_prompt_without_a_plan_reads_what_an_anonymous_one_has_left(engine):
    tokens = draw_tokens(random.Random(13), 700)
    engine.ask(tokens, org_plan(ANONYMOUS, tokens))
    assert engine.run(Ask(tokens, None))[0].read == 640
    assert engine.connector.cachescope.purge(OWNERS.prefix(ANONYMOUS)) == {"device": 5, "cpu": 5}
    assert engine.run(Ask(tokens, None))[0].read == 0


def test_a_session_scope_without_a_session_is_never_shared(engine):
    tokens = draw_tokens(random.Random(10), 700)
    for _ in range(2):
        nobody = plan(Caller("acme"), (300, Scope.ORG, 300), (len(tokens), Scope.SESSION, 300))
        assert engine.ask(tokens, nobody).read in (0, 256)
    assert engine.resident() == {("device", 300): 2 + 2 * 3, ("cpu", 300): 2}


def scoped_nothing(request, start, end, mm):
    return None, mm


def ignores_the_plan(request, start, end, mm):
    return (PLAN_KEY, "the same for all"), mm


@pytest.mark.parametrize("replacement", [scoped_nothing, ignores_the_plan])
def test_the_connector_refuses_to_run_without_its_hook(engine, monkeypatch, replacement):
    replacement.is_scoped = True  # as a plugin that wraps the wrapper would look
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", replacement)
    config = engine.args.create_engine_config()
    config.kv_transfer_config.engine_id = f"without a hook {replacement.__name__}"
    with pytest.raises(hashing.HookNotInForce, match="Refusing to start"):
        KVConnectorFactory.create_connector(
            config, KVConnectorRole.SCHEDULER, engine.scheduler.kv_cache_config
        )
    gc.collect()
    shm_regions.remove_stale()
    assert not list(Path("/dev/shm").glob(f"*without a hook {replacement.__name__}*"))


def test_the_connector_refuses_a_vllm_without_the_function(engine, monkeypatch):
    monkeypatch.delattr(kv_cache_utils, "generate_block_hash_extra_keys")
    with pytest.raises(hashing.HookNotInForce, match="has no"):
        secret = SECRET.encode()
        rules = PlanRules(RegionDefault(Scope.ORG, 300), CallerDirectory(secret, {}, None))
        hashing.enforce(secret, rules, Adapters())


def test_scope_keys_differ_between_secrets(engine):
    """Replicas with another secret cannot name these blocks."""
    tokens = draw_tokens(random.Random(11), 300)
    mine = org_plan("acme", tokens)
    theirs = replace(mine, spans=tuple(replace(span, key=span.key[::-1]) for span in mine.spans))
    engine.ask(tokens, mine)
    assert engine.ask(tokens, theirs).read == 0
