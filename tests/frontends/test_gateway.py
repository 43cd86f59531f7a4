"""The gateway in front of vLLM's Rust server: it does what the API side in vLLM's own server does,
for the same requests on the same model."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from demo.server import Server, free_port
from tests.engine.bodies import block, session, text
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import BLOCK
from tests.engine.server import (
    ENVIRONMENT,
    MODEL,
    NAMED_KEY,
    OPERATOR_TOKEN,
    OTHER_NAMED_KEY,
    Api,
    breaks,
    serve_scoped,
)
from tests.frontends.places import RUST, needs, options
from vllm_cachescope.cli import main as command

pytestmark = [pytest.mark.engine, needs(RUST)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SIZE = (
    *("--max-model-len", "8192", "--num-gpu-blocks-override", "400"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
CONFIG = {"regions": {"tools": {"scope": "global"}, "system": {"scope": "global"}}}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{i}",
            "description": text(f"tool {i}", 60),
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    }
    for i in range(3)
]


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway, and the server behind it.

    Attributes:
        api: the gateway.
        rust: the server's address.
        engine: its engine's own port.
    """

    api: Api
    rust: str
    engine: str


@pytest.fixture(scope="module")
def gateway(tiny_model, tmp_path_factory) -> Iterator[Gateway]:
    port, clock = free_port(), tmp_path_factory.mktemp("gateway") / "clock"
    arguments = options(tiny_model, *SIZE, front_end={"metrics_port": port}, **CONFIG)
    environment = ENVIRONMENT | {
        VARIABLE: str(clock),
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": str(RUST),
    }
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    engine = f"http://127.0.0.1:{port}"
    rust = Server([sys.executable, "-m", "tests.engine.vllm_cli", *arguments], environment)
    with rust:
        own = [sys.executable, "-m", "vllm_cachescope", "gateway"]
        own += ["--upstream", rust.url, "--engine", engine]
        own += ["--cachescope", transfer["kv_connector_extra_config"]["config_file"]]
        with Server(own, ENVIRONMENT) as server:
            yield Gateway(Api(server.url, Clock(clock)), rust.url, engine)


@pytest.fixture(scope="module")
def python(tiny_model, tmp_path_factory) -> Iterator[Api]:
    """The same with vLLM's server in Python."""
    with serve_scoped(tiny_model, tmp_path_factory.mktemp("python"), **CONFIG) as api:
        yield api


def chat(name: str, *messages: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 4,
        "temperature": 0,
        "messages": [*messages],
        **fields,
    }


def system(name: str, **marks: object) -> dict[str, Any]:
    return {"role": "system", "content": [block(f"{name} system", 300, **marks)]}


def user(name: str, words: int = 200, **marks: object) -> dict[str, Any]:
    return {"role": "user", "content": [block(f"{name} user", words, **marks)]}


def told(answer: httpx.Response) -> dict[str, Any]:
    """Return the answer to a request, of which nothing is ours but its usage."""
    assert answer.status_code == 200, answer.text
    assert "cachescope" not in answer.text and '"prompt_token_ids":[' not in answer.text
    result: dict[str, Any] = answer.json()
    return result


def streamed(api: Api, path: str, body: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a stream, and the usage that it tells."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    said, usage = "", {}
    answer = api.post(path, {**body, **more}, key)
    assert answer.status_code == 200 and "cachescope" not in answer.text
    assert "token_ids" not in answer.text
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                said += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return said, usage


def counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    details = usage["prompt_tokens_details"]
    return usage["prompt_tokens"], details["cached_tokens"], details["cache_write_tokens"]


HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SHORT = {"cache_control": {"type": "ephemeral"}}
ANSWERED = {"role": "assistant", "content": "The answer."}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "tool_1", "arguments": '{"x": "y"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": text("a result", 150)}


def requests() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield requests in their order: path, body, API key."""
    for key in (NAMED_KEY, NAMED_KEY, OTHER_NAMED_KEY):
        yield CHAT, chat("a", system("a"), user("a")), key
        yield CHAT, chat("b", system("b", **HOUR), user("b", **SHORT), tools=TOOLS), key
        yield CHAT, chat("b", system("b", **HOUR), user("b2"), tools=TOOLS), key
        # A breakpoint within the history, and behind it what is not covered.
        history = [system("c", **HOUR), user("c", **HOUR), ANSWERED, user("c2", 300)]
        yield CHAT, chat("c", *history), key
        yield CHAT, chat("c", *history, ANSWERED, user("c3", 5, **SHORT)), key
        turns = [system("d"), user("d", **SHORT), CALLED, RESULT]
        yield CHAT, chat("d", *turns, tools=TOOLS), key
        yield CHAT, chat("d", *turns, ANSWERED, user("d2"), tools=TOOLS), key
        yield CHAT, chat("e", user("e")), key
        yield CHAT, chat("f", user("é 日本 <|im_end|> \n", 250), user("f")), key
        thinks = {"chat_template_kwargs": {"enable_thinking": False}}
        yield CHAT, chat("g", system("g"), user("g"), **thinks), key
        yield COMPLETIONS, {"model": MODEL, "prompt": text("h"), "max_tokens": 4}, key
        tokens = list(range(20, 20 + 3 * BLOCK + 5))
        yield COMPLETIONS, {"model": MODEL, "prompt": tokens, "max_tokens": 4}, key


def test_it_reads_creates_and_answers_what_the_server_in_python_does(gateway, python) -> None:
    """Boundaries lie at the same tokens, whoever rendered the prompts."""
    read = 0
    for number, (path, body, key) in enumerate(requests()):
        body = {**body, "temperature": 0}
        bodies = [told(api.post(path, body, key)) for api in (gateway.api, python)]
        usages = [counts(answer["usage"]) for answer in bodies]
        assert usages[0] == usages[1], (number, usages)
        choices = [answer["choices"][0] for answer in bodies]
        texts = [one.get("text") or one["message"]["content"] for one in choices]
        assert texts[0] == texts[1], number
        read += usages[0][1]
    assert read > 60 * BLOCK


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_tells_what_an_answer_does(gateway, path) -> None:
    body = chat("stream", system("stream"), user("stream", **SHORT))
    if path == COMPLETIONS:
        body = {"model": MODEL, "prompt": text("streamed"), "max_tokens": 4, "temperature": 0}
    first, usage = streamed(gateway.api, path, body, NAMED_KEY)
    tokens, read, created = counts(usage)
    assert (read, created) == (0, tokens // BLOCK * BLOCK)
    again, usage = streamed(gateway.api, path, body, NAMED_KEY)
    assert (again, counts(usage)) == (first, (tokens, created, 0))
    answer = told(gateway.api.post(path, body, NAMED_KEY))
    assert counts(answer["usage"]) == (tokens, created, 0)
    choice = answer["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == first


def test_scopes_and_lifetimes_are_those_of_the_marks(gateway) -> None:
    api = gateway.api
    marked = {"cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "session"}}
    body = chat("own", system("own", **HOUR), user("own", 300, **marked))
    (_, read, created), *_ = [counts(told(ask(api, body, "s1"))["usage"])]
    assert read == 0 and created > 2 * BLOCK
    assert counts(told(ask(api, body, "s1"))["usage"])[1] == created
    # Another session shares the system prompt; another organisation, too.
    shared = counts(told(ask(api, body, "s2"))["usage"])[1]
    assert 0 < shared < created
    assert counts(told(ask(api, body, "s3", OTHER_NAMED_KEY))["usage"])[1] == shared
    api.clock.advance(301)
    assert counts(told(ask(api, body, "s1"))["usage"])[1] == created
    api.clock.advance(3601)
    assert counts(told(ask(api, body, "s1"))["usage"])[1] == 0


def ask(api: Api, body: dict[str, Any], name: str, key: str = NAMED_KEY) -> httpx.Response:
    return api.post(CHAT, body, key, **session(name))


def test_breaks_are_those_that_the_server_in_python_finds(gateway, python) -> None:
    key, marks = "key of the broken", {"cache_control": {"type": "ephemeral"}}
    found = []
    for api in (gateway.api, python):
        turns = [system("broken", **marks), user("broken")]
        for _ in range(3):
            ask(api, chat("broken", *turns, tools=TOOLS), "s", key)
            turns += [ANSWERED, user("broken, and on")]
        turns[0]["content"][0]["text"] += " Be kind."
        ask(api, chat("broken", *turns, tools=TOOLS), "s", key)
        turns += [ANSWERED, user("broken, and on")]
        ask(api, chat("broken", *turns, tools=TOOLS[:2]), "s", key)
        found.append([(b["cause"], b["where"], b["uncached"]) for b in breaks(api, key)])
    assert found[0] == found[1]
    assert [cause for cause, *_ in found[0]] == ["tools_changed", "system_changed"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_is_told_why(gateway, python, stream) -> None:
    key = f"key of the asking {stream}"
    told_why = []
    for api in (gateway.api, python):
        turns = [system("told"), user("told")]
        first = told(ask(api, chat("told", *turns), "s", key))
        turns[0]["content"][0]["text"] += " Be kind."
        turn = chat("told", *turns, ANSWERED, user("on"), stream=stream)
        turn["prompt_cache_options"] = {"comparison_response_id": first["id"]}
        answer = ask(api, turn, "s", key)
        assert answer.status_code == 200, answer.text
        lines = answer.text.replace("data: ", "").splitlines() if stream else [answer.text]
        told_why += [
            reply["prompt_cache_diagnostics"]
            for line in lines
            if line.startswith("{") and "prompt_cache_diagnostics" in (reply := json.loads(line))
        ][-1:]
    assert len(told_why) == 2 and told_why[0] == told_why[1]
    assert told_why[0]["reason"] and told_why[0]["cache_missed_tokens"] > 0


def test_a_client_that_asks_for_tokens_has_them(gateway) -> None:
    body = chat("tokens", user("tokens"), return_token_ids=True)
    answer = gateway.api.post(CHAT, body, NAMED_KEY).json()
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert len(answer["choices"][0]["token_ids"]) == 4
    plain = httpx.post(f"{gateway.rust}{CHAT}", json=body, timeout=60).json()
    assert plain["prompt_token_ids"] == answer["prompt_token_ids"]


def test_an_answer_has_the_fields_of_the_servers_own(gateway) -> None:
    body = chat("fields", user("fields"))
    own = httpx.post(f"{gateway.rust}{CHAT}", json=body, timeout=60).json()
    answer = told(gateway.api.post(CHAT, body, NAMED_KEY))
    assert answer.keys() == own.keys()
    assert answer["choices"][0] == own["choices"][0]


def test_a_clients_own_plan_is_none(gateway) -> None:
    body = chat("forged", user("forged", 400))
    read = counts(told(gateway.api.post(CHAT, body, NAMED_KEY))["usage"])[2]
    for forged in ("x", {"spans": [[64, 1, "00", 300, True]]}, {"cut": [[None, 1, "00", 300, 1]]}):
        sent = {**body, "kv_transfer_params": {"cachescope": forged, "other": 1}}
        usage = told(gateway.api.post(CHAT, sent, NAMED_KEY))["usage"]
        assert counts(usage)[1] == read > 0


def test_several_prompts_are_cached_for_their_organisation(gateway) -> None:
    prompts = [text(f"several {i}") for i in range(2)]
    body = {"model": MODEL, "prompt": prompts, "max_tokens": 1}
    assert gateway.api.post(COMPLETIONS, body, NAMED_KEY).status_code in (200, 400)


def test_what_the_server_refuses_it_refuses(gateway) -> None:
    api = gateway.api
    assert api.post(CHAT, {"model": MODEL, "messages": "x"}, NAMED_KEY).status_code in (400, 422)
    assert api.post("/v1/messages", chat("m", user("m")), NAMED_KEY).status_code in (404, 501)
    assert api.post(CHAT, chat("m", user("m"), max_tokens=-5), NAMED_KEY).status_code in (400, 422)


def test_the_engine_is_let_go_when_a_client_disconnects(gateway) -> None:
    body = chat("gone", user("gone", 400), max_tokens=4000, ignore_eos=True, stream=True)
    url, headers = f"{gateway.api.url}{CHAT}", {"x-api-key": "key of the gone"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while "vllm:num_requests_running" in (shown := httpx.get(f"{gateway.rust}/metrics").text):
        (running,) = [
            line for line in shown.splitlines() if line.startswith("vllm:num_requests_running")
        ]
        if float(running.split()[-1]) == 0:
            break
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def test_its_operations_are_those_of_the_engines(gateway, monkeypatch, capsys) -> None:
    health = httpx.get(f"{gateway.api.url}/cachescope/health").json()
    assert [tier["name"] for tier in health["tiers"]] == ["device", "cpu"]
    assert httpx.get(f"{gateway.engine}/health").json()["status"] == health["status"] == "ok"
    body = chat("purged", user("purged", 400))
    for _ in range(2):
        tokens = counts(told(gateway.api.post(CHAT, body, NAMED_KEY))["usage"])[1]
    assert tokens > 0
    headers = {"authorization": f"Bearer {NAMED_KEY}"}
    over = httpx.delete(f"{gateway.api.url}/cachescope/sessions/unheard-of", headers=headers)
    assert (over.status_code, over.json()["blocks"]) == (200, 0)
    monkeypatch.setenv("CACHESCOPE_OPERATOR_TOKEN", OPERATOR_TOKEN)
    assert command.main(["purge", "--url", gateway.api.url, "--org", "named"]) == 0
    assert "entries forgotten: device" in capsys.readouterr().out
    assert counts(told(gateway.api.post(CHAT, body, NAMED_KEY))["usage"])[1] == 0


def test_its_metrics_stand_behind_the_servers(gateway) -> None:
    shown = httpx.get(f"{gateway.api.url}/metrics").text
    assert "vllm:prompt_tokens_total" in shown and "cachescope_stage_seconds" in shown
