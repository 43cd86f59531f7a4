"""Who may ask a server for what, before any engine is asked."""

import json
from hashlib import sha256
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.core.reach import reachable
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.http_request import joined_headers
from vllm_cachescope.api.operations import Operations
from vllm_cachescope.api.purge_budget import BURST
from vllm_cachescope.cache.report import EngineId, Outcome, Report, Row
from vllm_cachescope.config import Config, load
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS
from vllm_cachescope.wire.extras import extra_fields

SECRET = "a secret of the tests"
OWNERS = OwnerTags(SECRET.encode())
TOKEN = "the operator's token"
UP = {"name": "cpu", "up": True, "reason": None, "used_bytes": 3, "capacity_bytes": 9}
DOWN = {"name": "redis", "address": "redis://host", "up": False, "reason": "refused by host"}


class Recorded(Engines):
    """Engines that keep what they are asked, with tiers in whatever state a test needs."""

    def __init__(self, *tiers: dict[str, Any], answers: bool = True) -> None:
        self.purged: list[bytes] = []
        self.ended: list[bytes] = []
        self._tiers = list(tiers)
        self._answers = answers

    async def health(self) -> list[list[dict[str, Any]]]:
        if not self._answers:
            raise TimeoutError
        return [self._tiers]

    async def end_session(self, owners) -> int:
        if not self._answers:
            raise TimeoutError
        self.ended += owners
        return 7

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        if not self._answers:
            raise TimeoutError
        self.purged.append(prefix)
        down = {t["name"]: str(t["reason"]) for t in self._tiers if not t["up"]}
        return Purged({"device": 1, "cpu": 2}, down)


@pytest.fixture(scope="module")
def diagnoser():
    return Diagnoser(SECRET.encode(), 16, registry=CollectorRegistry())


@pytest.fixture
def renderings() -> list[tuple[str | None, str | None]]:
    """Whose renderings were purged: organisations and sessions."""
    return []


@pytest.fixture
def forget(diagnoser, renderings):
    """Forget as the API process does."""

    def forget(org: str | None, session: str | None) -> int:
        renderings.append((org, session))
        return diagnoser.purge(org, session)

    return forget


@pytest.fixture
def ask(diagnoser, forget):
    """Ask operations with a configuration; return status and answer."""

    async def ask(
        method: str,
        path: str,
        body: object = None,
        key: str | None = None,
        engines: Engines | None = None,
        known: bool = True,
        headers: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
        **config: object,
    ) -> tuple[int, Any]:
        settings = made(config)
        directory = CallerDirectory(SECRET.encode(), settings.tenant_names(), settings.org_header)
        operations = Operations(
            settings,
            directory,
            diagnoser,
            engines or Recorded(),
            forget,
            lambda: 0.0,
        )
        sent = dict(headers or {}) | ({"x-api-key": key} if key else {})

        async def read_body() -> bytes:
            return body if isinstance(body, bytes) else json.dumps(body).encode()

        response = await operations.answer(method, path, sent, known, read_body, fields)
        return response.status_code, json.loads(bytes(response.body))

    return ask


def made(config: dict[str, object]) -> Config:
    tenants = {sha256(b"acme's key").hexdigest(): "acme"}
    return load({"secret": SECRET, "operator_token": TOKEN, "tenants": tenants} | config)


@pytest.mark.parametrize(
    ("body", "prefixes"),
    [
        ({"all": True}, [b""]),
        ({"org": "acme"}, [OWNERS.prefix("name:acme")]),
        ({"org": "name:acme"}, [OWNERS.prefix("name:acme")]),
        ({"org": "key:0123"}, [OWNERS.prefix("key:0123"), OWNERS.prefix("key:0123", None, False)]),
        ({"org": "global"}, [bytes(8)]),
        ({"org": "acme", "session": "s"}, [OWNERS.prefix("name:acme", "s")]),
        ({"session": "s"}, [OWNERS.prefix("anonymous", "s")]),
    ],
)
async def test_the_operator_may_purge_anything(ask, body, prefixes) -> None:
    engines = Recorded()
    status, answer = await ask("POST", "/cachescope/purge", body, TOKEN, engines)
    assert (status, engines.purged) == (200, prefixes)
    assert answer["purged"] == {"device": len(prefixes), "cpu": 2 * len(prefixes)}


async def test_a_name_may_be_a_tenants_and_a_gateways(ask) -> None:
    engines = Recorded()
    body = {"org": "acme"}
    await ask("POST", "/cachescope/purge", body, TOKEN, engines, org_header="x-org")
    assert engines.purged == [OWNERS.prefix("name:acme"), OWNERS.prefix("header:acme")]


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        ({"org": "acme"}, OWNERS.prefix("name:acme")),
        ({"session": "s"}, OWNERS.prefix("name:acme", "s")),
        ({"org": "acme", "session": "s"}, OWNERS.prefix("name:acme", "s")),
    ],
)
async def test_an_organisation_may_purge_its_own(ask, renderings, body, prefix) -> None:
    engines = Recorded()
    status, answer = await ask("POST", "/cachescope/purge", body, "acme's key", engines)
    assert (status, answer["orgs"], engines.purged) == (200, ["name:acme"], [prefix])
    # What others have rendered stays: a tenant's purge costs nobody else.
    assert renderings == [("name:acme", body.get("session"))]


@pytest.mark.parametrize(
    ("body", "key", "status", "says"),
    [
        ({"all": True}, "acme's key", 403, "only the operator"),
        # Which organisations there are is not a tenant's to know.
        ({"org": "zeta"}, "acme's key", 403, "this key is of name:acme"),
        ({"org": "name:zeta"}, "acme's key", 403, "this key is of name:acme"),
        ({"org": "global"}, "acme's key", 403, "only the operator"),
        ({"org": "anonymous"}, "acme's key", 403, "only the operator"),
        ({"org": "acme"}, "another key", 401, "present operator_token"),
        ({"org": "zeta"}, "another key", 401, "present operator_token"),
        ({"all": True}, None, 401, "present operator_token"),
        ({"org": "anonymous"}, None, 401, "operator token"),
        ({"session": "s"}, None, 401, "operator token"),
        ({"all": True}, TOKEN + "x", 401, "present operator_token"),
        ({"all": True}, TOKEN[:-1], 401, "present operator_token"),
        ({"org": "zeta"}, TOKEN, 404, "GET /cachescope/breaks list"),
        ({}, TOKEN, 400, "does not say what"),
        ({"all": False}, TOKEN, 400, "does not say what"),
        ({"all": 1}, TOKEN, 400, "does not say what"),
        ({"all": True, "org": "acme"}, TOKEN, 400, "does not say what"),
        ({"org": ""}, TOKEN, 400, "does not say what"),
        ({"org": ["acme"]}, TOKEN, 400, "does not say what"),
        ({"org": "acme", "sesion": "s"}, TOKEN, 400, "does not say what"),
        ({"org": "global", "session": "s"}, TOKEN, 400, "no session"),
        ([], TOKEN, 400, "not a JSON object"),
        (b"{", TOKEN, 400, "not a JSON object"),
        (b"[" * 100_000, TOKEN, 400, "not a JSON object"),
    ],
)
async def test_what_is_wrong_or_not_the_callers_is_refused(ask, body, key, status, says) -> None:
    engines = Recorded()
    found, answer = await ask("POST", "/cachescope/purge", body, key, engines)
    assert (found, answer["type"], engines.purged) == (status, "error", [])
    assert says in answer["error"]["message"]


async def test_an_account_that_purges_without_end_is_told_to_wait(diagnoser) -> None:
    settings, engines, now = made({}), Recorded(), [0.0]
    directory = CallerDirectory(SECRET.encode(), settings.tenant_names(), None)
    operations = Operations(
        settings, directory, diagnoser, engines, diagnoser.purge, lambda: now[0]
    )

    async def purge(key: str) -> Any:
        async def read_body() -> bytes:
            return b'{"session": "made up"}'

        return await operations.answer(
            "POST", "/cachescope/purge", {"x-api-key": key}, True, read_body
        )

    answers = [await purge("acme's key") for _ in range(BURST + 1)]
    assert {answer.status_code for answer in answers[:-1]} == {200}
    refused = answers[-1]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert json.loads(bytes(refused.body))["error"]["type"] == "rate_limit_error"
    assert len(engines.purged) == BURST
    now[0] += 1
    assert (await purge("acme's key")).status_code == 200
    # Keys that anyone can make up share one budget; the operator needs none.
    made_up = [(await purge(f"key {i}")).status_code for i in range(BURST + 1)]
    assert made_up == [200] * BURST + [429]
    assert {(await purge(TOKEN)).status_code for _ in range(2 * BURST)} == {200}


async def test_without_a_token_in_the_configuration_nobody_is_the_operator(ask) -> None:
    for key in (None, "", "None", TOKEN):
        engines = Recorded()
        options = {"engines": engines, "operator_token": None}
        status, _ = await ask("POST", "/cachescope/purge", {"all": True}, key, **options)
        assert (status, engines.purged) == (401, [])


@pytest.mark.parametrize(
    ("sent", "status"), [("ein langer schlüssel", 200), ("ein langer schlussel", 401)]
)
async def test_the_operators_token_is_compared_byte_by_byte(ask, sent, status) -> None:
    headers = joined_headers({"headers": [(b"X-API-Key", sent.encode())]})
    options = {"headers": headers, "operator_token": "ein langer schlüssel"}
    assert (await ask("POST", "/cachescope/purge", {"all": True}, **options))[0] == status


def test_headers_of_one_name_are_one_list() -> None:
    sent = [(b"anthropic-beta", b"b, a"), (b"x-session-id", b"s"), (b"Anthropic-Beta", b"c")]
    headers = joined_headers({"headers": sent})
    assert dict(headers) == {"anthropic-beta": "b, a, c", "x-session-id": "s"}
    assert extra_fields({}, headers) == {"anthropic-beta": ["a", "b", "c"]}


async def test_a_key_the_server_does_not_know_may_nothing_but_see_the_state(ask) -> None:
    engines = Recorded(UP)
    options = {"key": "acme's key", "engines": engines, "known": False}
    assert (await ask("POST", "/cachescope/purge", {"org": "acme"}, **options))[0] == 401
    assert (await ask("GET", "/cachescope/breaks", **options))[0] == 401
    assert (await ask("GET", "/cachescope/health", **options))[0] == 200
    assert not engines.purged


async def test_a_purge_drops_the_requests_and_breaks_as_well(ask, diagnoser) -> None:
    def tool(org: str, session: str) -> str:
        return f"tool of {session} of {org}"

    def request(text: str, org: str, session: str) -> dict[str, Any]:
        blocks = [{"type": "text", "text": text}, {"type": "text", "text": "stays " * 50}]
        return {"model": "m", "max_tokens": 1, "system": blocks, "metadata": {"user_id": session},
                "tools": [{"name": tool(org, session), "input_schema": {"type": "object"}}],
                "messages": [{"role": "user", "content": "hello"}]}  # fmt: skip

    for org, session in (("name:acme", "s"), ("name:acme", "t"), ("name:zeta", "s")):
        for text in ("one " * 99, "other " * 99):
            body = request(text, org, session)
            read = READERS[Protocol.MESSAGES](body, (300,), 300)
            pending = diagnoser.open(Caller(org, session), read, body, {})
            rows = (Row(Outcome.CREATED, Scope.ORG, 300, 200),)
            report = Report(rows, engine=EngineId(0, "epoch"))
            diagnoser.close(pending, [report], None)
    # Tools' names are remembered apart from the requests, too.
    everyone = {("name:acme", "s"), ("name:acme", "t"), ("name:zeta", "s")}
    assert all(is_kept(diagnoser, tool(*owner)) for owner in everyone)
    for body, left in (
        ({"org": "acme", "session": "s"}, {("name:acme", "t"), ("name:zeta", "s")}),
        ({"org": "acme"}, {("name:zeta", "s")}),
        ({"all": True}, set()),
    ):
        _, answer = await ask("POST", "/cachescope/purge", body, TOKEN)
        assert answer["fingerprints"] == 2
        assert {owner for owner in everyone if is_kept(diagnoser, tool(*owner))} == left
        assert {
            (seen.caller.org, seen.caller.session) for seen in diagnoser.breaks.recent(None)
        } == left
        assert set(diagnoser.orgs()) == {org for org, _ in left}


def is_kept(root: object, text: str) -> bool:
    """Tell whether ``root`` keeps ``text`` alive, as text or as bytes."""
    return any(
        (isinstance(item, str) and text in item)
        or (isinstance(item, bytes | bytearray) and text.encode() in item)
        for item in reachable(root)
    )


@pytest.mark.parametrize("key", ["acme's key", TOKEN])
async def test_breaks_are_answered_whatever_a_client_calls_its_tools(ask, diagnoser, key) -> None:
    half = "\ud800"
    for value in (1, 2):
        tool = {"name": half, "input_schema": {"type": "object"}, half: value}
        body = {"model": half, "max_tokens": 1, "tools": [tool],
                "messages": [{"role": "user", "content": "hello " * 99}]}  # fmt: skip
        read = READERS[Protocol.MESSAGES](body, (300,), 300)
        pending = diagnoser.open(Caller("name:acme", "half"), read, body, {})
        report = Report((Row(Outcome.CREATED, Scope.ORG, 300, 200),), engine=EngineId(0, "epoch"))
        diagnoser.close(pending, [report], None)
    status, answer = await ask("GET", "/cachescope/breaks", key=key)
    assert (status, answer["breaks"][0]["changes"][0]["fields"]) == (200, [half])
    body = {"org": "acme", "session": half}
    assert (await ask("POST", "/cachescope/purge", body, TOKEN))[0] == 200
    diagnoser.purge(None)


async def test_a_purge_that_did_not_reach_a_tier_says_so(ask) -> None:
    body, engines = {"all": True}, Recorded(UP, DOWN)
    status, answer = await ask("POST", "/cachescope/purge", body, TOKEN, engines)
    assert status == 502
    assert answer["unreached"] == {"redis": "refused by host"}
    assert answer["purged"] == {"device": 1, "cpu": 2}
    silent = Recorded(answers=False)
    assert (await ask("POST", "/cachescope/purge", body, TOKEN, silent))[0] == 503


async def test_the_state_is_for_everyone_and_the_rest_for_the_operator(ask) -> None:
    acme = OWNERS.prefix("name:acme").hex()
    tiers = UP | {"orgs": {acme: 2, bytes(8).hex(): 1, "unheard of": 0}}, DOWN
    status, answer = await ask("GET", "/cachescope/health", engines=Recorded(*tiers))
    assert (status, answer["status"]) == (200, "degraded")
    assert answer["tiers"] == [
        {"engine": 0, "name": "cpu", "up": True, "used_bytes": 3, "capacity_bytes": 9},
        {"engine": 0, "name": "redis", "up": False},
    ]
    _, answer = await ask("GET", "/cachescope/health", key=TOKEN, engines=Recorded(*tiers))
    cpu, redis = answer["tiers"]
    assert cpu["orgs"] == {"name:acme": 2, "global": 1, "unheard of": 0}
    assert (redis["address"], redis["reason"]) == ("redis://host", "refused by host")


@pytest.mark.parametrize(
    ("tiers", "well"),
    [
        ([UP], True),
        ([UP | {"readable": True, "writable": True}], True),
        ([UP | {"readable": False}], False),
        ([UP | {"writable": False}], False),
        ([UP, DOWN], False),
    ],
)
async def test_one_tier_that_is_not_well_shows(ask, tiers, well) -> None:
    _, answer = await ask("GET", "/cachescope/health", engines=Recorded(*tiers))
    assert answer["status"] == ("ok" if well else "degraded")


async def test_an_engine_that_does_not_answer_shows(ask) -> None:
    status, answer = await ask("GET", "/cachescope/health", engines=Recorded(answers=False))
    assert (status, answer["status"]) == (200, "degraded")


@pytest.mark.parametrize("path", ["/cachescope/purge", "/cachescope/health", "/cachescope/breaks"])
async def test_another_method_is_told_which_one(ask, path) -> None:
    status, answer = await ask("PUT", path, key=TOKEN)
    assert (status, "use " in answer["error"]["message"]) == (405, True)


async def test_a_session_that_is_over_is_its_organisations_to_say(ask) -> None:
    path, over = "/cachescope/sessions/a/b c", [OWNERS.prefix("name:acme", "a/b c")]
    engines = Recorded()
    status, answer = await ask("DELETE", path, key="acme's key", engines=engines)
    assert (status, engines.ended, engines.purged) == (200, over, [])
    assert answer == {"orgs": ["name:acme"], "session": "a/b c", "blocks": 7}
    engines = Recorded()
    fields = {"org": "acme"}
    status, _ = await ask("DELETE", path, key=TOKEN, engines=engines, fields=fields)
    assert (status, engines.ended) == (200, over)


@pytest.mark.parametrize(
    ("method", "key", "fields", "known", "status"),
    [
        ("GET", "acme's key", {}, True, 405),
        ("DELETE", "acme's key", {"org": "zeta"}, True, 403),
        ("DELETE", "another key", {"org": "acme"}, True, 401),
        ("DELETE", None, {}, True, 401),
        ("DELETE", "acme's key", {}, False, 401),
        ("DELETE", TOKEN, {"org": "nobody"}, True, 404),
    ],
)
async def test_nobody_else_ends_a_session(ask, method, key, fields, known, status) -> None:
    engines = Recorded()
    path = "/cachescope/sessions/s"
    found, _ = await ask(method, path, key=key, engines=engines, fields=fields, known=known)
    assert (found, engines.ended) == (status, [])


async def test_an_engine_that_does_not_answer_ends_no_session(ask) -> None:
    engines = Recorded(answers=False)
    status, _ = await ask("DELETE", "/cachescope/sessions/s", key="acme's key", engines=engines)
    assert status == 503
