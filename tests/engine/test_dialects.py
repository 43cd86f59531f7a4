"""Markers where real clients put them, against a real server: nothing that plain vLLM serves is
refused on OpenAI's endpoints, unless the operator wants it."""

from collections import Counter

import openai
import pytest

from tests.engine.bodies import EPHEMERAL, HOUR, block, text
from tests.engine.engine import BLOCK
from tests.engine.server import MODEL, ONE_PROCESS, serve_scoped

pytestmark = pytest.mark.engine

MARK = {"cache_control": EPHEMERAL}
POINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}
IGNORED = "cachescope_ignored_markers_total"


def chat(*messages: dict, **fields: object) -> dict:
    return {
        "model": MODEL,
        "max_tokens": 2,
        "temperature": 0.0,
        "messages": list(messages),
    } | fields


def weigh(name: str, **marks: object) -> dict:
    function = {"name": "weigh", "description": text(name, 300), "parameters": {"type": "object"}}
    return {"type": "function", "function": function, **marks}


def call(name: str, words: int = 300, **marks: object) -> dict:
    arguments = '{"what": "' + text(name, words) + '"}'
    function = {"name": "weigh", "arguments": arguments}
    return {"id": f"call {name}", "type": "function", "function": function, **marks}


def calling(name: str, *calls: dict, content: object = "", **marks: object) -> list[dict]:
    """Return a question, the calls that answer it, and their results but for the last one."""
    return [
        {"role": "user", "content": text(name, 100)},
        {"role": "assistant", "content": content, "tool_calls": list(calls), **marks},
    ]


def result(content: object, **marks: object) -> dict:
    return {"role": "tool", "tool_call_id": "call", "content": content, **marks}


def usage(api, body: dict) -> Counter:
    reply = api.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    counts = reply.json()["usage"]
    details = counts["prompt_tokens_details"]
    return Counter(
        prompt=counts["prompt_tokens"],
        read=details["cached_tokens"],
        created=details["cache_write_tokens"],
    )


# Each makes a conversation with a marker in its middle, and more text after it.
PLACES = {
    "tool call": lambda n, m: [*calling(n, call(n, **m)), result(text(f"{n} result"))],
    "first of two tool calls": lambda n, m: calling(n, call(n, **m), call(f"{n} two")),
    "function of a tool call": lambda n, m: [
        *calling(n, {**call(n), "function": {**call(n)["function"], **m}}),
        result(text(f"{n} result")),
    ],
    "message with tool calls": lambda n, m: [
        *calling(n, call(n), content=None, **m),
        result(text(f"{n} result")),
    ],
    "message with content parts": lambda n, m: [
        {"role": "user", "content": [block(n, 200), block(f"{n} two", 200)], **m},
        {"role": "assistant", "content": text(f"{n} answer")},
    ],
    "message with a string": lambda n, m: [
        {"role": "user", "content": text(n), **m},
        {"role": "assistant", "content": text(f"{n} answer")},
    ],
    "empty tool result": lambda n, m: [
        *calling(n, call(n)),
        result("", **m),
        {"role": "user", "content": text(f"{n} next")},
    ],
    "tool result with parts": lambda n, m: [
        *calling(n, call(n)),
        result([block(f"{n} result", 100)], **m),
        {"role": "user", "content": text(f"{n} next")},
    ],
}


@pytest.mark.parametrize("marker", [MARK, POINT], ids=["cache_control", "breakpoint"])
@pytest.mark.parametrize("place", PLACES)
def test_a_marker_ends_what_it_stands_on(api, place, marker):
    """What comes after it is not written, and the prompt is the same as without it."""
    name = f"dialect {place} {next(iter(marker))}"
    explicit = {"prompt_cache_options": {"mode": "explicit"}}
    first = usage(api, chat(*PLACES[place](name, marker), **explicit))
    assert BLOCK <= first["created"] <= first["prompt"] - BLOCK
    api.empty_device()
    again = usage(api, chat(*PLACES[place](name, marker), **explicit))
    assert again["read"] == first["created"]
    api.empty_device()
    bare = usage(api, chat(*PLACES[place](name, {}), **explicit))
    assert (bare["read"], bare["prompt"]) == (first["created"], first["prompt"])


@pytest.mark.parametrize("marker", [MARK, POINT], ids=["cache_control", "breakpoint"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_marker_on_a_tool(api, marker, inside):
    name = f"dialect tool {inside} {next(iter(marker))}"

    def ask(question: str) -> Counter:
        tool = weigh(name)
        (tool["function"] if inside else tool).update(marker)
        explicit = {"prompt_cache_options": {"mode": "explicit"}}
        message = {"role": "user", "content": text(f"{question} {name}")}
        return usage(api, chat(message, tools=[tool], **explicit))

    first = ask("one")
    assert BLOCK <= first["created"] <= first["prompt"] - BLOCK
    api.empty_device()
    assert ask("two")["read"] == first["created"]


USER = {"role": "user", "content": "List the files."}
IGNORABLE = {
    "empty": chat({"role": "system", "content": [{"type": "text", "text": "", **MARK}]}, USER),
    "too_many": chat(
        {"role": "user", "content": [block(f"many {i}", 9, **MARK) for i in range(7)]}
    ),
    "malformed": chat(USER, cache_control="yes"),
    "unknown_field": chat(USER, cache_control={**EPHEMERAL, "tll": "5m"}),
    "unknown_ttl": chat(USER, cache_control={**EPHEMERAL, "ttl": "7h"}),
    "unknown_scope": chat(USER, cache_control={**EPHEMERAL, "scope": "planet"}),
    "longer_ttl": chat(
        {"role": "user", "content": [block("s", 9, **MARK), block("l", 9, cache_control=HOUR)]}
    ),
    "wider_scope": chat(
        {
            "role": "user",
            "content": [
                block(scope, 9, cache_control={**EPHEMERAL, "scope": scope})
                for scope in ("org", "global")
            ],
        }
    ),
    "two_dialects": chat({"role": "user", "content": [block("b", 9, **MARK, **POINT)]}),
    "misplaced": chat(
        USER,
        tools=[weigh("choice")],
        tool_choice={"type": "function", "function": {"name": "weigh"}, **MARK},
    ),
    "option": chat(USER, prompt_cache_retention="forever"),
}


@pytest.mark.parametrize("reason", IGNORABLE)
def test_what_is_ignored_is_served_and_counted(api, reason):
    before = api.metrics(IGNORED, "reason")
    usage(api, IGNORABLE[reason])
    expected = 3 if reason == "too_many" else 1
    assert api.metrics(IGNORED, "reason") - before == {(reason,): expected}


def test_an_unknown_scope_is_shared_with_nobody(api):
    body = chat(
        {"role": "user", "content": [block("unknown", cache_control={**EPHEMERAL, "scope": "x"})]}
    )
    assert [usage(api, body)["read"] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_cache_options": {"ttl": "12h"}},
        {"prompt_cache_options": {"ttl": "7h", "mode": "implicit"}},
        {"prompt_cache_retention": "forever"},
        {"prompt_cache_retention": "24h"},
    ],
)
def test_responses_and_completions_with_any_lifetime(api, options):
    for path, prompt in (
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
    ):
        reply = api.post(path, {"model": MODEL, **prompt, **options})
        assert reply.status_code == 200, reply.text


def test_an_empty_tool_result_in_a_message(api):
    """As Anthropic's API has it: a marker may stand on the result, not on an empty text."""

    def ask(inner: dict) -> int:
        use = {"type": "tool_use", "id": "t", "name": "weigh", "input": {}}
        turns = [
            {"role": "user", "content": text("empty results")},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [inner]},
        ]
        body = {"model": MODEL, "max_tokens": 2, "messages": turns}
        return api.post("/v1/messages", body).status_code

    empty = {"type": "tool_result", "tool_use_id": "t", "content": ""}
    assert ask({**empty, **MARK}) == 200
    assert ask({"type": "text", "text": "", **MARK}) == 400
    assert ask({"type": "text", "text": "x", **MARK}) == 200


# What a strict server refuses


@pytest.fixture(scope="module")
def strict_api(tiny_model, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("strict")
    policy = {"openai": "strict", "anthropic": "lenient"}
    with serve_scoped(tiny_model, scratch, *ONE_PROCESS, markers=policy) as api:
        yield api


def with_chat(part: dict, **fields) -> dict:
    return {
        "model": MODEL,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", **part}]}],
        **fields,
    }


BAD_CHAT = {
    "ttl": (
        with_chat({"cache_control": {**EPHEMERAL, "ttl": "3m"}}),
        "messages[0].content[0].cache_control.ttl", "3m", "5m",
    ),
    "breakpoint mode": (
        with_chat({"prompt_cache_breakpoint": {"mode": "magic"}}),
        "messages[0].content[0].prompt_cache_breakpoint.mode", "magic", "explicit",
    ),
    "both kinds": (
        with_chat({"prompt_cache_breakpoint": {"mode": "explicit"}}, cache_control=EPHEMERAL),
        "messages[0].content[0].prompt_cache_breakpoint", "explicit", "not both",
    ),
    "options": (
        with_chat({}, prompt_cache_options={"ttl": "7h"}),
        "prompt_cache_options.ttl", "7h", "30m",
    ),
    "retention": (
        with_chat({}, prompt_cache_retention="forever"),
        "prompt_cache_retention", "forever", "in_memory",
    ),
    "key": (with_chat({}, prompt_cache_key=5), "prompt_cache_key", "5", "string"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD_CHAT)
def test_bad_chats_are_refused(strict_api, case, stream):
    body, path, value, allowed = BAD_CHAT[case]
    with pytest.raises(openai.BadRequestError) as refused:
        strict_api.openai().chat.completions.create(
            model=MODEL, messages=body["messages"], extra_body={**body, "stream": stream}
        )
    error = refused.value.response.json()["error"]
    assert refused.value.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", path)
    assert error["message"].startswith(f"{path}: ")
    assert value in error["message"]
    assert allowed in error["message"].partition("allowed: ")[2]


def test_bad_responses_and_completions_are_refused(strict_api):
    for path, body in (
        ("/v1/responses", {"input": "x", "prompt_cache_options": {"mode": "x"}}),
        ("/v1/completions", {"prompt": "x", "prompt_cache_options": {"mode": "x"}}),
    ):
        reply = strict_api.post(path, {"model": MODEL, **body})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "prompt_cache_options.mode"


def test_a_lenient_server_ignores_what_anthropics_api_refuses(strict_api):
    body = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "x", **MARK}]}
    assert strict_api.post("/v1/messages", body).status_code == 200
