"""Why a prompt was not read, told by a real server to real clients."""

import json
import re
from pathlib import Path

import psutil
import pytest

from tests.engine.bodies import EPHEMERAL, agent_body, block, session
from tests.engine.engine import BLOCK
from tests.engine.server import MODEL, Api, breaks

pytestmark = pytest.mark.engine


def log(api: Api) -> str:
    """Return what the server has written so far."""
    port = int(api.url.rpartition(":")[2])
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    pid = next(c.pid for c in listening if c.laddr.port == port)
    return Path(f"/proc/{pid}/fd/1").read_text(errors="replace")


@pytest.mark.parametrize("streamed", [False, True])
def test_the_client_hears_what_it_changed(api: Api, streamed: bool) -> None:
    client = api.anthropic("key of the diagnosed")
    name = f"streamed {streamed}"
    first = client.messages.create(**agent_body(name), extra_headers=session(name))
    changed = agent_body(name, "Weighs anything.", diagnostics={"previous_message_id": first.id})
    if streamed:
        with client.messages.stream(**changed, extra_headers=session(name)) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**changed, extra_headers=session(name))
    assert message.diagnostics is not None
    assert message.diagnostics.cache_miss_reason.type == "tools_changed"

    seen = next(b for b in breaks(api, "key of the diagnosed") if b["session"] == name)
    assert (seen["cause"], seen["expected"]) == ("tools_changed", False)
    assert seen["where"]["path"].startswith("tools[0]")
    assert breaks(api, "key of someone else") == []


def asked(api: Api, key: str, given: dict, streamed: bool):
    """Return the answer to a Messages request."""
    client = api.anthropic(key)
    if not streamed:
        return client.messages.create(**given)
    with client.messages.stream(**given) as stream:
        return stream.get_final_message()


REASONS = [
    # The server has one model; to Anthropic's client a changed speed is a changed model.
    ("model_changed", {"speed": "fast"}),
    ("tools_changed", {"tool": "Weighs anything."}),
    ("system_changed", {"system": [block("another system prompt", 500)]}),
    ("messages_changed", {"question": "another"}),
    ("unavailable", {"tool_choice": {"type": "auto"}}),
    ("previous_message_not_found", {"diagnostics": {"previous_message_id": "msg_unknown"}}),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("reason", "change"), REASONS)
def test_anthropics_clients_hear_each_reason(
    api: Api, reason: str, change: dict, streamed: bool
) -> None:
    key = f"key of {reason}, streamed {streamed}"
    first = asked(api, key, agent_body(key), streamed)
    changed = agent_body(key, **{"diagnostics": {"previous_message_id": first.id}, **change})
    message = asked(api, key, changed, streamed)
    found = message.diagnostics.cache_miss_reason
    assert found.type == reason
    if reason.endswith("_changed"):
        usage = message.usage
        computed = usage.input_tokens + usage.cache_creation_input_tokens
        assert 0 <= found.cache_missed_input_tokens <= computed
        # The speed reaches no prompt: all was read.
        assert (found.cache_missed_input_tokens > 0) == (reason != "model_changed")


def test_breaks_are_listed_and_counted(api: Api) -> None:
    def counted():
        return api.metrics("cachescope_breaks_total", "cause", "region", "expected")

    key, before = "key of the changeable", counted()
    for description in ("Weighs things.", "Weighs anything."):
        asked(api, key, agent_body(key, description), streamed=False)
    edited = agent_body(key, description)
    edited["system"][0]["text"] += " Be kind."
    asked(api, key, edited, streamed=False)
    # Another conversation of the session, and a break in it.
    aside = agent_body(f"{key}, aside", tools=[], system=[block("a title, please", 300)])
    asked(api, key, aside, streamed=False)
    aside["system"][0]["text"] += " A short one."
    asked(api, key, aside, streamed=False)

    seen = breaks(api, key)
    assert [(one["cause"], one["lineage"]) for one in seen] == [
        ("system_changed", 2),
        ("system_changed", 1),
        ("tools_changed", 1),
    ]
    assert [one["at"] for one in seen] == sorted((one["at"] for one in seen), reverse=True)
    assert +(counted() - before) == {
        ("tools_changed", "tools", "false"): 1,
        ("system_changed", "system", "false"): 2,
    }


@pytest.mark.parametrize("expected", [False, True])
def test_a_break_is_in_the_servers_log(api: Api, expected: bool) -> None:
    key, name = "key of the logged", f"logged, expected {expected}"
    client = api.anthropic(key)
    # The template renders nothing of the beta's name: a break that costs nothing.
    change = {} if expected else {"tool": "Weighs anything."}
    for fields, beta in (({}, "one"), (change, "other")):
        headers = session(name) | {"anthropic-beta": beta}
        client.messages.create(**agent_body(name, **fields), extra_headers=headers)
    (seen,) = (b for b in breaks(api, key) if b["session"] == name)
    assert seen["expected"] == expected
    (line,) = (line for line in log(api).splitlines() if name in line)
    before, _, data = line.partition("cache break ")
    assert ("INFO" if expected else "WARNING") in before
    assert json.loads(data) == seen


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_the_engine_process_logs_as_vllm_does(api: Api, tier: str) -> None:
    (line,) = (line for line in log(api).splitlines() if f"Tier {tier} at " in line)
    assert re.search(r"^\(EngineCore.* INFO .*\[connector\.py:\d+\] Tier ", line), line


def test_what_did_not_change_is_not_reported(api: Api) -> None:
    client = api.anthropic("key of the steady")
    first = client.messages.create(**agent_body("steady"), extra_headers=session("steady"))
    asked = agent_body("steady", diagnostics={"previous_message_id": first.id})
    again = client.messages.create(**asked, extra_headers=session("steady"))
    assert again.usage.cache_read_input_tokens > 0
    assert again.diagnostics is None
    assert breaks(api, "key of the steady") == []


def test_another_organisations_message_is_not_found(api: Api) -> None:
    first = api.anthropic("key of the owner").messages.create(**agent_body("owned"))
    asked = agent_body("owned", diagnostics={"previous_message_id": first.id})
    answer = api.anthropic("key of the curious").messages.create(**asked)
    assert answer.diagnostics.cache_miss_reason.type == "previous_message_not_found"


def test_an_expiry_is_named_with_its_lifetime(api: Api) -> None:
    client = api.anthropic("key of the late")
    for advance in (0, 400):
        api.clock.advance(advance)
        client.messages.create(**agent_body("late"), extra_headers=session("late"))
    (seen,) = breaks(api, "key of the late")
    assert seen["cause"] == "expired"
    assert seen["engine"][0]["ttl_s"] == 300 and seen["engine"][0]["age_s"] == pytest.approx(100)
    unexplained = api.metrics("cachescope_unexplained_tokens_total")
    assert sum(unexplained.values()) == 0


def test_openais_clients_hear_it_in_their_words(api: Api) -> None:
    client = api.openai("key of the other format")
    asked = {"model": MODEL, "max_output_tokens": 3, "input": "tide " * 900}
    first = client.responses.create(instructions="Be brief. " * 40, **asked)
    compare = {"prompt_cache_options": {"comparison_response_id": first.id}}
    changed = client.responses.create(
        instructions="Be very brief. " * 40, extra_body=compare, **asked
    )
    assert changed.prompt_cache_diagnostics.type == "cache_miss"
    assert changed.prompt_cache_diagnostics.reason == "input_changed"
    unknown = {"prompt_cache_options": {"comparison_response_id": "resp_unknown"}}
    missing = client.responses.create(extra_body=unknown, **asked)
    assert missing.prompt_cache_diagnostics.type == "comparison_response_not_found"


def tool(description: str) -> dict:
    return {"name": "weigh", "description": description, "parameters": {"type": "object"}}


def respond(api: Api, key: str, **fields):
    given = {"model": MODEL, "max_output_tokens": 3, "input": "tide " * 600,
             "instructions": "Be brief. " * 60,
             "tools": [{"type": "function", **tool("Weighs things.")}]} | fields  # fmt: skip
    response = api.openai(key).responses.create(**given)
    usage = response.usage
    return response, usage.input_tokens, usage.input_tokens_details.cached_tokens


def chat(api: Api, key: str, instructions: str = "Be brief. " * 60, **fields):
    messages = [{"role": "system", "content": instructions},
                {"role": "user", "content": "tide " * 600}]  # fmt: skip
    tools = [{"type": "function", "function": tool("Weighs things.")}]
    given = {"model": MODEL, "max_tokens": 3, "messages": messages, "tools": tools} | fields
    answer = api.openai(key).chat.completions.create(**given)
    usage = answer.usage
    return answer, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


HEAVY = tool("Weighs anything.")


@pytest.mark.parametrize(
    ("ask", "change", "reason"),
    [
        (respond, {"tools": [{"type": "function", **HEAVY}]}, "tools_changed"),
        (respond, {"instructions": "Be very brief. " * 60}, "input_changed"),
        (respond, {"service_tier": "flex"}, None),
        (respond, {"prompt_cache_key": "another"}, None),
        (respond, {"text": {"verbosity": "low"}}, None),
        (chat, {"tools": [{"type": "function", "function": HEAVY}]}, "tools_changed"),
        (chat, {"instructions": "Be very brief. " * 60}, "input_changed"),
        (chat, {"service_tier": "flex"}, None),
        (chat, {"verbosity": "low"}, None),
        (chat, {"response_format": {"type": "text"}}, None),
    ],
)
def test_openais_clients_hear_no_reason_for_what_was_read(
    api: Api, ask, change: dict, reason: str | None
) -> None:
    key = f"key of {ask.__name__} {change}"
    first, _, _ = ask(api, key)
    compare = {"prompt_cache_options": {"comparison_response_id": first.id}}
    answer, prompt, read = ask(api, key, extra_body=compare, **change)
    said = answer.model_dump()["prompt_cache_diagnostics"]
    if reason is None:
        assert said == {"type": "cache_hit"}
        assert prompt - read <= 2 * BLOCK
        return
    assert (said["type"], said["reason"]) == ("cache_miss", reason)
    assert 0 < said["cache_missed_tokens"] <= prompt - read
    assert read <= said["comparison_reusable_tokens"] < prompt


def test_another_salt_or_scope_is_a_break_that_is_explained(api: Api) -> None:
    key = "key of the salted"
    for salt in ("one", "two"):
        named = session("salted")
        _, _, read = chat(api, key, extra_body={"cache_salt": salt}, extra_headers=named)
        assert read == 0
    (seen,) = breaks(api, key)
    assert (seen["cause"], seen["where"]["path"]) == ("params_changed", "cache_salt")
    assert seen["missed_tokens"] > 0

    key = "key of the narrowed"
    for scope in ("org", "session"):
        given = agent_body(key)
        given["system"][0]["cache_control"] = {**EPHEMERAL, "scope": scope}
        asked(api, key, given, streamed=False)
    (seen,) = breaks(api, key)
    assert seen["cause"] == "markers_changed"
    assert seen["where"]["path"] == "system[0].cache_control.scope"
    assert seen["missed_tokens"] > 0
    assert sum(api.metrics("cachescope_unexplained_tokens_total").values()) == 0
