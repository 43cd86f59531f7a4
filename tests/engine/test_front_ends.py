"""Prompts that no API side of ours has seen: what the engine makes of a salt, a session and a plan
in ``kv_hints``, as gRPC servers, vLLM's Rust server and routers send them."""

import socket
import threading
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.engine import (
    BLOCK,
    KEYS,
    OWNERS,
    SECRET,
    Ask,
    draw_tokens,
    org_plan,
    sealed,
)
from vllm_cachescope.connectors.vllm.engine import exporter as exporter_module
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.door import EngineDoor
from vllm_cachescope.connectors.vllm.engine.exporter import Exporter, start
from vllm_cachescope.connectors.vllm.engine.prompt_plans import PlanRules, PromptPlans
from vllm_cachescope.connectors.vllm.engine_command import sealed as seal_command
from vllm_cachescope.prompt.open_plan import Beginning, OpenPlan, OpenSpan, seal_open
from vllm_cachescope.prompt.plan import PLAN_KEY
from vllm_cachescope.prompt.plan_hint import ACTION, VERSION
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

LONG, WHOLE = 3 * BLOCK + 9, 3 * BLOCK
"""A prompt's length, and how much of it is cached, in tokens."""

TIERS = ("device", "cpu")


@pytest.fixture
def tokens(chance) -> list[int]:
    return draw_tokens(chance, LONG)


@pytest.fixture
def trusting(engine, monkeypatch):
    """The engine, as if its configuration had ``front_end: {trusted: true}``."""
    secret = SECRET.encode()
    directory = CallerDirectory(secret, {"": "listed"}, None)
    rules = PlanRules(RegionDefault(Scope.ORG, 300), directory, trusts_front_end=True)
    monkeypatch.setattr(hashing, "_plans", PromptPlans(secret, rules))
    return engine


def hint(org="acme", session=None, spans=None, version=VERSION):
    payload = {"organisation": org}
    if session is not None:
        payload["session"] = session
    if spans is not None:
        payload["spans"] = [
            {"end": end, "scope": scope, "ttl_s": ttl_s} for end, scope, ttl_s in spans
        ]
    return (ACTION, version, payload)


def read(engine, tokens, tier, params=None, **asked) -> int:
    """Return how many tokens of a prompt are read where only ``tier`` may hold it."""
    if tier == "cpu":
        store_all(engine)
        engine.empty_device()
    (answer,) = engine.run(Ask(tokens, params, 1, **asked))
    assert (answer.report is None) == (params is None)
    return answer.read


def store_all(engine) -> None:
    """Have vLLM store what the last prompt left: it does so in the next one's first step."""
    engine.run(Ask([299] * 9, None, 1))


@pytest.mark.parametrize("tier", TIERS)
def test_whoever_names_nothing_shares_with_requests_without_a_key(engine, tokens, tier):
    assert read(engine, tokens, "device") == 0
    assert read(engine, tokens, tier) == WHOLE
    assert read(engine, tokens, tier, session="s1") == WHOLE
    (answer,) = engine.run(Ask(tokens, sealed(org_plan(ANONYMOUS, tokens))))
    assert answer.read == WHOLE


@pytest.mark.parametrize("tier", TIERS)
def test_salts_share_with_nobody_and_read_their_own(engine, tokens, tier):
    assert read(engine, tokens, "device", salt="dynamo-cache-salt:acme") == 0
    assert read(engine, tokens, tier, salt="dynamo-cache-salt:acme") == WHOLE
    for other in ("dynamo-cache-salt:bcme", "other", ""):
        assert read(engine, tokens, tier, salt=other) == 0
    assert read(engine, tokens, tier, salt="dynamo-cache-salt:acme") == WHOLE


def test_a_salt_is_an_organisation_that_anyone_could_have_made_up(engine, tokens):
    blocks = {"device": 3, "cpu": 3}
    for salt in ("acme", "dynamo-cache-salt:acme"):
        engine.run(Ask(tokens, None, 1, salt=salt))
        store_all(engine)
        prefix = OWNERS.prefix("salt:acme", is_listed=False)
        assert engine.connector.command_purge(prefix, f"{salt} by salt") == blocks
    engine.run(Ask(tokens, None, 1, salt="name:listed"))
    for org in (ANONYMOUS, "name:listed", "salt:acme"):
        left = engine.connector.command_purge(OWNERS.prefix(org), f"no salt's {org}")
        assert left["device"] == 0


def test_a_trusted_front_ends_salt_names_the_organisation(trusting, tokens):
    trusting.run(Ask(tokens, None, 1, salt="dynamo-cache-salt:listed"))
    purged = trusting.connector.command_purge(OWNERS.prefix("name:listed"), "listed")
    assert purged["device"] == 3


def test_a_hint_is_a_plan(trusting, tokens):
    """It reads what the API side's plans have stored, and leaves behind what they read."""
    trusting.run(Ask(tokens, sealed(org_plan("name:acme", tokens, 3600)), 1))
    assert read(trusting, tokens, "device", hints=(hint(),)) == WHOLE
    assert read(trusting, tokens, "device", hints=(hint("name:acme"),)) == WHOLE
    assert read(trusting, tokens, "device", hints=(hint("other"),)) == 0
    other = sealed(org_plan("name:other", tokens))
    assert read(trusting, tokens, "device", params=other) == WHOLE


def test_a_hints_scopes_and_lifetimes_hold(trusting, tokens):
    spans = [(BLOCK, "global", 3600), (2 * BLOCK, "org", 3600), (LONG, "session", 300)]

    def ask(org, session):
        (answer,) = trusting.run(Ask(tokens, None, 1, hints=(hint(org, session, spans),)))
        return answer.read

    assert [ask("name:listed", "s1"), ask("name:listed", "s1")] == [0, WHOLE]
    assert ask("name:listed", "s2") == 2 * BLOCK
    trusting.clock.advance(301)
    trusting.connector.command_sweep()
    assert ask("name:listed", "s1") == 2 * BLOCK
    trusting.clock.advance(3601)
    trusting.connector.command_sweep()
    assert ask("name:listed", "s1") == 0


def test_what_no_span_covers_is_kept_on_the_device_alone(trusting, tokens):
    short = hint(spans=[(BLOCK, "org", 300)])
    trusting.run(Ask(tokens, None, 1, hints=(short,)))
    assert read(trusting, tokens, "device", hints=(short,)) == WHOLE
    assert read(trusting, tokens, "cpu", hints=(short,)) == BLOCK


WRONG = {
    "version": hint(version="2.0"),
    "schema": (ACTION, VERSION, {"organisation": "acme", "tenant": "b"}),
    "organisation": hint("global"),
    "global": hint(ANONYMOUS, spans=[(LONG, "global", 300)]),
    "ttl": hint(spans=[(LONG, "org", 301)]),
    "spans": hint(spans=[(LONG + 1, "org", 300)]),
}


def refused(engine, reason) -> float:
    return engine.counter("cachescope_refused_plan_hints", reason)


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_hint_is_counted_and_the_prompt_cached_all_the_same(trusting, tokens, reason):
    before = refused(trusting, reason)
    assert read(trusting, tokens, "device", hints=(WRONG[reason],)) == 0
    assert read(trusting, tokens, "cpu", hints=(WRONG[reason],)) == WHOLE
    assert read(trusting, tokens, "device") == WHOLE
    assert refused(trusting, reason) == before + 2


def test_whom_the_operator_does_not_trust_claims_no_organisation(engine, tokens):
    engine.run(Ask(tokens, sealed(org_plan("name:acme", tokens)), 1))
    before = refused(engine, "untrusted")
    assert read(engine, tokens, "device", hints=(hint(),)) == 0
    assert read(engine, tokens, "device", salt="name:acme") == 0
    assert read(engine, tokens, "device", hints=(hint(),)) == WHOLE  # its own, as without a key
    assert refused(engine, "untrusted") == before + 2


def test_others_hints_are_none_of_ours(engine, tokens):
    before = engine.counter("cachescope_refused_plan_hints")
    assert read(engine, tokens, "device", hints=(("kvcr.prefetch", "1.0", {}),)) == 0
    assert read(engine, tokens, "device") == WHOLE
    assert engine.counter("cachescope_refused_plan_hints") == before


@pytest.fixture
def exporter(engine, monkeypatch) -> Iterator[Exporter]:
    exporter = Exporter("127.0.0.1", 0, "toy", 0, by_org=False)
    monkeypatch.setattr(engine.connector, "_exporter", exporter)
    yield exporter
    exporter.close()


def scrape(exporter) -> dict[tuple[str, tuple[str, ...]], float]:
    text = httpx.get(f"http://127.0.0.1:{exporter.port}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def vllms() -> dict[tuple[str, tuple[str, ...]], float]:
    shown = {"engine", "model_name"}
    return {
        (sample.name, tuple(sorted({**sample.labels, "model_name": "toy"}.items()))): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("cachescope_") and shown <= {*sample.labels}
    }


def test_a_port_of_its_own_shows_what_vllm_shows(engine, exporter, chance):
    before = vllms()
    prompts = [draw_tokens(chance, 500) for _ in range(20)]
    for tokens in prompts + prompts[:5]:
        engine.run(Ask(tokens, sealed(org_plan("acme", tokens)), 1))
    store_all(engine)
    shown, expected = scrape(exporter), vllms()
    grown = {
        name: value - before.get(name, 0.0)
        for name, value in expected.items()
        if name[0].endswith(("_total", "_bucket", "_sum", "_count"))
        and value != before.get(name, 0.0)
    }
    assert len(grown) > 20
    assert {name: shown.get(name) for name in grown} == pytest.approx(grown)
    gauges = {"cachescope_resident_bytes", "cachescope_tier_used_bytes"}
    levels = {name: value for name, value in shown.items() if name[0] in gauges}
    assert len(levels) >= 3 and levels == {name: expected[name] for name in levels}


def test_a_port_that_is_taken_costs_no_engine_its_start(exporter):
    assert start("127.0.0.1", exporter.port, "toy", 0, by_org=False) is None
    assert start("127.0.0.1", 65535, "toy", 1, by_org=False) is None


def test_a_client_that_says_nothing_keeps_nobody_waiting_for_long(exporter, monkeypatch):
    monkeypatch.setattr(exporter_module.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", exporter.port)):
        assert scrape(exporter) is not None


@pytest.fixture
def door(engine, monkeypatch) -> Iterator[str]:
    """The engine's own port, with the door of its connector."""
    connector = engine.connector
    door = EngineDoor(connector.desk, connector.command, SECRET.encode(), 0)
    exporter = Exporter("127.0.0.1", 0, "toy", 0, by_org=False, door=door)
    over = threading.Event()

    def run() -> None:
        # As the engine does between two steps.
        while not over.wait(0.005):
            connector.desk.answer()

    thread = threading.Thread(target=run)
    thread.start()
    yield f"http://127.0.0.1:{exporter.port}"
    over.set()
    thread.join()
    exporter.close()


def test_its_own_port_tells_its_health_and_takes_sealed_commands(engine, door, tokens):
    assert read(engine, tokens, "device", sealed(org_plan("acme", tokens))) == 0
    health = httpx.get(f"{door}/health").json()
    assert health["status"] == "ok"
    assert [tier["name"] for tier in health["tiers"]] == ["device", "cpu"]
    assert health["tiers"][0]["used_bytes"] > 0 and "orgs" not in str(health)

    def command(name: str, *args: object, secret: str = SECRET) -> httpx.Response:
        return httpx.post(f"{door}/command", content=seal_command(name, [*args], secret.encode()))

    prefix = OWNERS.prefix("acme")
    assert command("purge", prefix, "p", "acme", None, secret="another " * 4).status_code == 403
    assert read(engine, tokens, "device", sealed(org_plan("acme", tokens))) == WHOLE
    purged = msgspec.msgpack.decode(command("purge", prefix, "p", "acme", None).content)
    assert purged["device"] == WHOLE // BLOCK
    assert read(engine, tokens, "device", sealed(org_plan("acme", tokens))) == 0
    assert msgspec.msgpack.decode(command("facts").content) == {"block_tokens": BLOCK}


def test_an_open_plan_shares_as_a_closed_one_does(engine, tokens):
    acme = Caller("acme")
    scopes = ((Scope.GLOBAL, Beginning.of([*tokens[: BLOCK + 5], 7, 7])), (Scope.ORG, None))
    opened = OpenPlan(
        tuple(OpenSpan(at, scope, KEYS.key(scope, acme, ""), 300) for scope, at in scopes),
        "a nonce",
        OWNERS.of(acme),
    )
    closed = opened.closed(tokens)
    assert [span.end for span in closed.spans] == [BLOCK + 5, LONG]
    secret = SECRET.encode()
    open_params, forged = ({PLAN_KEY: seal_open(opened, s)} for s in (secret, b"another secret"))
    assert read(engine, tokens, "device", open_params) == 0
    assert read(engine, tokens, "device", sealed(closed)) == WHOLE
    (answer,) = engine.run(Ask(tokens, forged, 1))
    assert answer.read == 0
    # Another prompt that begins with the same: what is behind the beginning is its own.
    other = [*tokens[: BLOCK + 5], *tokens[BLOCK + 6 :], 9]
    assert read(engine, other, "device", open_params) == BLOCK
