"""The real clients against a real server: every usage field, every source of identity, every
refusal, and nothing else changed."""

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anthropic
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.bodies import EPHEMERAL, HOUR, block, text
from tests.engine.engine import BLOCK
from tests.engine.server import MODEL, NAMED_KEY, OTHER_NAMED_KEY
from tests.redis.servers import wait_until
from vllm_cachescope.metrics import LEDGER_RECORDS, METRICS, NO_ENGINE, SESSION_NOTES

pytestmark = pytest.mark.engine

README = Path(__file__).parents[2] / "README.md"


def messages_body(name: str, **fields: object) -> dict:
    """Return a Messages body with a system prompt kept for an hour and a message for minutes."""
    return {
        "model": MODEL,
        "max_tokens": 4,
        "system": [block(f"system {name}", cache_control=HOUR)],
        "messages": [
            {"role": "user", "content": [block(f"question {name}", cache_control=EPHEMERAL)]}
        ],
        **fields,
    }


def chat_body(name: str, **fields: object) -> dict:
    """Return the same as a Chat Completions body."""
    return {
        "model": MODEL,
        "max_tokens": 4,
        "messages": [
            {"role": "system", "content": [block(f"system {name}", cache_control=HOUR)]},
            {"role": "user", "content": [block(f"question {name}", cache_control=EPHEMERAL)]},
        ],
        **fields,
    }


@dataclass(frozen=True)
class Counts:
    """A usage in one shape for all formats; tokens."""

    read: int
    created: int
    uncached: int
    short: int = 0
    long: int = 0

    @property
    def prompt(self) -> int:
        return self.read + self.created + self.uncached


def of_messages(usage) -> Counts:
    usage = usage if isinstance(usage, dict) else usage.model_dump()
    by_ttl = usage["cache_creation"]
    counts = Counts(
        usage["cache_read_input_tokens"],
        usage["cache_creation_input_tokens"],
        usage["input_tokens"],
        by_ttl["ephemeral_5m_input_tokens"],
        by_ttl["ephemeral_1h_input_tokens"],
    )
    assert counts.short + counts.long == counts.created
    return counts


def of_chat(usage) -> Counts:
    usage = usage if isinstance(usage, dict) else usage.model_dump()
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    read, created = details["cached_tokens"], details["cache_write_tokens"]
    return Counts(read, created, usage["prompt_tokens"] - read - created)


def of_responses(usage) -> Counts:
    usage = usage if isinstance(usage, dict) else usage.model_dump()
    details = usage["input_tokens_details"]
    by_ttl = details["cache_write_tokens_details"]
    read, created = details["cached_tokens"], details["cache_write_tokens"]
    short, long = by_ttl["ttl_30m_tokens"], by_ttl["ttl_12h_tokens"]
    assert short + long == created
    return Counts(read, created, usage["input_tokens"] - read - created, short, long)


def floor(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


# One function for each way to ask: it takes the API, a name for the prompt and whose key, and
# returns the counts of the whole answer.


def ask_messages(api, name, key="key of acme", **fields):
    message = api.anthropic(key).messages.create(**messages_body(name, **fields))
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4
    return of_messages(message.usage)


def stream_messages(api, name, key="key of acme", **fields):
    with api.anthropic(key).messages.stream(**messages_body(name, **fields)) as stream:
        events = list(stream)
        message = stream.get_final_message()
    assert message.usage.output_tokens == 4
    final = of_messages(message.usage)
    (delta,) = (event for event in events if event.type == "message_delta")
    assert of_messages(delta.usage.model_dump()) == final
    (start,) = (event for event in events if event.type == "message_start")
    # What was read is known from the start.
    first = of_messages(start.message.usage)
    assert (first.prompt, first.read) == (final.prompt, final.read)
    return final


def ask_chat(api, name, key="key of acme", **fields):
    return of_chat(api.openai(key).chat.completions.create(**chat_body(name, **fields)).usage)


def stream_chat(api, name, key="key of acme", **fields):
    chunks = api.openai(key).chat.completions.create(
        **chat_body(name, **fields), stream=True, stream_options={"include_usage": True}
    )
    *_, last = chunks
    return of_chat(last.usage)


def completions_body(name, **fields):
    body = {"model": MODEL, "prompt": text(name, 800), "max_tokens": 4, "temperature": 0.0}
    return body | fields


def ask_completions(api, name, key="key of acme", **fields):
    body = completions_body(name, **fields)
    return of_chat(api.openai(key).completions.create(**body).usage)


def stream_completions(api, name, key="key of acme", **fields):
    body = completions_body(name, stream_options={"include_usage": True}, **fields)
    *_, last = api.openai(key).completions.create(**body, stream=True)
    return of_chat(last.usage)


def responses_body(name, **fields):
    body = {"model": MODEL, "input": text(name, 800), "max_output_tokens": 4, "temperature": 0.0}
    return body | fields


def ask_responses(api, name, key="key of acme", **fields):
    body = responses_body(name, **fields)
    return of_responses(api.openai(key).responses.create(**body).usage)


def stream_responses(api, name, key="key of acme", **fields):
    *_, last = api.openai(key).responses.create(**responses_body(name, **fields), stream=True)
    assert last.type in ("response.completed", "response.incomplete")
    return of_responses(last.response.usage)


PAIRS = {
    "messages": (ask_messages, stream_messages),
    "chat": (ask_chat, stream_chat),
    "completions": (ask_completions, stream_completions),
    "responses": (ask_responses, stream_responses),
}
ASKS = [ask for pair in PAIRS.values() for ask in pair]


@pytest.mark.parametrize("ask", ASKS)
def test_cold_warm_and_from_memory(api, ask):
    name = ask.__name__
    cold = ask(api, name)
    assert cold.prompt > 6 * BLOCK
    # The end of the prompt may be the template's and not the message's, by some tokens.
    assert cold.read == 0
    assert cold.created == floor(cold.prompt)

    warm = ask(api, name)
    assert (warm.read, warm.created) == (floor(cold.prompt - 1), 0)
    assert warm.prompt == cold.prompt

    api.empty_device()
    assert ask(api, name) == warm


def test_a_client_may_ask_what_each_tier_had(api):
    client = api.anthropic("key of the curious")
    header = {"x-cachescope-usage": "tiers"}
    client.messages.create(**messages_body("tiers"))
    api.empty_device()
    for tier in ("cpu", "device"):
        usage = client.messages.create(**messages_body("tiers"), extra_headers=header).usage
        read = usage.cache_read_input_tokens
        assert usage.model_dump()["cached_tokens_details"] == {tier: read} and read > 0
    with pytest.raises(anthropic.BadRequestError, match=r"x-cachescope-usage.*tiers"):
        client.messages.create(
            **messages_body("tiers"), extra_headers={"x-cachescope-usage": "all"}
        )


@pytest.mark.parametrize("ask", ASKS)
def test_another_organisation_reads_nothing(api, ask):
    name = f"secrets, {ask.__name__}"
    ask(api, name)
    other = ask(api, name, key="key of zeta")
    assert other.read == 0
    assert other.created == floor(other.prompt)
    assert ask(api, name).read == floor(other.prompt - 1)


@pytest.mark.parametrize("plain, streamed", PAIRS.values(), ids=PAIRS)
def test_streamed_and_not_are_one_cache(api, plain, streamed):
    name = f"one cache, {plain.__name__}"
    assert plain(api, name).read == 0
    assert streamed(api, name).read > 0


@pytest.mark.parametrize("ask", [ask_messages, stream_messages])
def test_creation_is_told_by_lifetime(api, ask):
    name = f"lifetimes, {ask.__name__}"
    counts = ask(api, name)
    assert counts.long > 2 * BLOCK, "the system prompt"
    assert counts.short > 2 * BLOCK, "the message"
    api.clock.advance(301)
    later = ask(api, name)
    assert later.read == counts.long
    assert (later.short, later.long) == (counts.short, 0)
    api.clock.advance(3601)
    assert ask(api, name) == counts


@pytest.mark.parametrize("ask", [ask_responses, stream_responses])
def test_openais_lifetimes(api, ask):
    for ttl, seconds in (("30m", 1800), ("12h", 43200)):
        fields = {"extra_body": {"prompt_cache_options": {"ttl": ttl}}}
        name = f"{ttl}, {ask.__name__}"
        cold = ask(api, name, **fields)
        assert (cold.short > 0, cold.long > 0) == (ttl == "30m", ttl == "12h")
        api.clock.advance(seconds - 1)
        assert ask(api, name, **fields).read == floor(cold.prompt - 1)
        api.clock.advance(seconds)
        assert ask(api, name, **fields).read == 0


@pytest.mark.parametrize("retention, seconds", [("24h", 86400), ("in_memory", 300)])
def test_openais_retention(api, retention, seconds):
    fields = {"prompt_cache_retention": retention}
    name = f"kept {retention}"
    cold = ask_responses(api, name, **fields)
    api.clock.advance(seconds - 1)
    assert ask_responses(api, name, **fields).read == floor(cold.prompt - 1)
    api.clock.advance(seconds)
    assert ask_responses(api, name, **fields).read == 0


def test_an_openai_breakpoint_on_a_content_part(api):
    def ask(question):
        parts = [
            {**block("breakpoint"), "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
            block(question, 20),
        ]
        completion = api.openai().chat.completions.create(
            model=MODEL,
            max_tokens=4,
            messages=[{"role": "user", "content": parts}],
            extra_body={"prompt_cache_options": {"mode": "explicit"}},
        )
        return of_chat(completion.usage)

    first = ask("one question")
    assert first.created >= 2 * BLOCK
    api.empty_device()
    assert ask("another question").read == first.created


def test_the_top_levels_automatic_breakpoint(api):
    body = messages_body("automatic", cache_control=HOUR)
    body["system"] = text("system automatic")
    body["messages"] = [{"role": "user", "content": text("question automatic")}]
    counts = of_messages(api.anthropic().messages.create(**body).usage)
    assert counts.long == counts.created == floor(counts.prompt)


def test_tools_are_cached(api):
    tools = [
        {
            "name": f"tool_{i}",
            "description": text(f"tool {i}", 60),
            "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}},
        }
        for i in range(6)
    ]
    tools[-1]["cache_control"] = HOUR

    def ask(name):
        body = messages_body(name, tools=tools)
        del body["system"]
        return of_messages(api.anthropic().messages.create(**body).usage)

    first = ask("with tools")
    assert first.long > 2 * BLOCK
    assert ask("with tools, another question").read == first.long


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(api, stream):
    name = f"stop {stream}"
    fields = {"max_tokens": 200, "stop_sequences": ["e", "a", "o"]}

    def ask():
        if not stream:
            return api.anthropic().messages.create(**messages_body(name, **fields))
        with api.anthropic().messages.stream(**messages_body(name, **fields)) as stopped:
            return stopped.get_final_message()

    first, second = ask(), ask()
    assert first.stop_reason == second.stop_reason == "stop_sequence"
    assert of_messages(first.usage).created == floor(of_messages(first.usage).prompt)
    assert of_messages(second.usage).read == floor(of_messages(first.usage).prompt - 1)
    assert of_messages(second.usage).created == 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_count_their_prompt_once(api, stream):
    ask = stream_chat if stream else ask_chat
    name = f"choices {stream}"
    first = ask(api, name, n=3)
    assert (first.read, first.created) == (0, floor(first.prompt))
    second = ask(api, name, n=3)
    assert (second.read, second.created) == (floor(first.prompt - 1), 0)
    assert ask(api, name) == second


def test_several_prompts_of_one_request_are_summed(api):
    prompts = [text(f"prompt {i}", 300) for i in range(3)]
    client = api.openai()

    def ask(prompt):
        return of_chat(client.completions.create(model=MODEL, prompt=prompt, max_tokens=2).usage)

    together = ask(prompts)
    assert together.created > 3 * BLOCK
    assert together.created % BLOCK == 0
    each = [ask(prompt) for prompt in prompts]
    assert sum(counts.prompt for counts in each) == together.prompt
    assert ask(prompts).read == sum(counts.read for counts in each)


@pytest.mark.parametrize("stream", [False, True])
def test_prewarming(api, stream):
    name = f"prewarmed {stream}"
    body = messages_body(name, max_tokens=0)
    if stream:
        with api.anthropic().messages.stream(**body) as streamed:
            message = streamed.get_final_message()
    else:
        message = api.anthropic().messages.create(**body)
    assert message.content == []
    assert (message.usage.output_tokens, message.stop_reason) == (0, "max_tokens")
    filled = of_messages(message.usage)
    assert filled.created == floor(filled.prompt)
    assert ask_messages(api, name).read == floor(filled.prompt - 1)


# Identity


def session_body(name: str, **fields: object) -> dict:
    body = messages_body(name, **fields)
    body["system"][0]["cache_control"] = {"type": "ephemeral", "scope": "session", "ttl": "1h"}
    return body


SESSIONS = {
    "our header": lambda s: ({}, {"X-CacheScope-Session": s}),
    "vLLM's header": lambda s: ({}, {"X-Session-Id": s}),
    "Claude Code's header": lambda s: ({}, {"X-Claude-Code-Session-Id": s}),
    "Anthropic's metadata": lambda s: (
        {"metadata": {"user_id": json.dumps({"session_id": s})}},
        {},
    ),
    "the body": lambda s: ({"session_id": s}, {}),
}


@pytest.mark.parametrize("source", SESSIONS)
def test_sources_of_the_session(api, source):
    def ask(session, by=source):
        fields, headers = SESSIONS[by](session)
        body = session_body(f"session by {source}", **fields)
        reply = api.post("/v1/messages", body, **headers)
        return of_messages(reply.json()["usage"]).read

    assert ask("one") == 0
    warm = ask("one")
    assert warm > 5 * BLOCK
    assert ask("two") == 0
    # However it is said, it is the same session.
    assert ask("one", "our header") >= warm


@pytest.mark.parametrize("field", ["prompt_cache_key", "session_id"])
def test_sources_of_the_session_in_openais_formats(api, field):
    body = chat_body(f"session by {field}")
    body["messages"][0]["content"][0]["cache_control"] = {"type": "ephemeral", "scope": "session"}
    body["messages"][1]["content"][0].pop("cache_control")

    def ask(session):
        completion = api.openai().chat.completions.create(**body, extra_body={field: session})
        return of_chat(completion.usage).read

    assert ask("one") == 0
    assert ask("one") > 2 * BLOCK
    assert ask("two") == 0


def test_a_session_scope_without_a_session_is_never_shared(api):
    for _ in range(2):
        reply = api.post("/v1/messages", session_body("nobody's session"))
        counts = of_messages(reply.json()["usage"])
        assert (counts.read, counts.created) == (0, 0)


def test_sessions_of_one_organisation_share_what_is_the_organisations(api):
    def ask(session, key):
        body = session_body("shared in part")
        body["system"].insert(0, block("handbook", cache_control={**HOUR, "scope": "org"}))
        body["system"].insert(0, block("law", cache_control={**HOUR, "scope": "global"}))
        headers = {"X-CacheScope-Session": session}
        return of_messages(api.post("/v1/messages", body, key, **headers).json()["usage"]).read

    assert ask("s1", NAMED_KEY) == 0
    everything = ask("s1", NAMED_KEY)
    of_the_org = ask("s2", NAMED_KEY)
    of_all = ask("s1", OTHER_NAMED_KEY)
    assert 2 * BLOCK <= of_all < of_the_org < everything
    api.empty_device()
    assert ask("s3", NAMED_KEY) == of_the_org
    assert ask("s2", OTHER_NAMED_KEY) == of_the_org, "s1 of zeta has left zeta's own"


def test_what_a_client_that_is_no_writer_marks_global_is_its_organisations(api):
    body = messages_body("junk")
    body["system"][0]["cache_control"] = {**HOUR, "scope": "global"}
    reasons = api.metrics("cachescope_ignored_markers_total", "reason")
    name, labels = "cachescope_prompt_tokens_total", ("outcome", "scope", "ttl")
    before = api.metrics(name, *labels)

    def ask(key):
        return of_messages(api.post("/v1/messages", body, key).json()["usage"])

    counts = [ask(key) for key in ("made up", "made up, too", "made up", NAMED_KEY)]
    assert [count.read > 0 for count in counts] == [False, False, True, False]
    assert api.metrics("cachescope_ignored_markers_total", "reason") - reasons == {
        ("not_a_writer",): 3
    }
    created = "created", "global", "1h"
    wait_until(lambda: api.metrics(name, *labels)[created] - before[created] == counts[3].long)
    found = api.metrics(name, *labels) - before
    assert {outcome for outcome, scope, _ in +found if scope == "global"} <= {"created", "uncached"}


def test_an_organisation_is_its_api_key(api):
    body = messages_body("whose key")

    def ask(**headers):
        reply = api.post("/v1/messages", body, None, **headers)
        return of_messages(reply.json()["usage"]).read

    assert ask(**{"x-api-key": "key of acme"}) == 0
    warm = ask(authorization="Bearer key of acme")
    assert warm > 0
    assert ask() == 0, "no key is nobody's"
    assert ask() == warm, "but the anonymous share"
    assert ask(**{"x-api-key": "key of acme.", "x-cachescope-org": "acme"}) == 0


# Refusals


def with_system(*controls) -> dict:
    body = messages_body("refused")
    body["system"] = [block(i, 3, cache_control=control) for i, control in enumerate(controls)]
    del body["messages"][0]["content"][0]["cache_control"]
    return body


BAD_MESSAGES = {
    "five breakpoints": (
        with_system(*[EPHEMERAL] * 5), "system[4].cache_control", "ephemeral", "at most 4"
    ),
    "type": (
        with_system({"type": "forever"}), "system[0].cache_control.type", "forever", "ephemeral"
    ),
    "ttl": (
        with_system({**EPHEMERAL, "ttl": "2h"}), "system[0].cache_control.ttl", "2h", "5m, 30m, 1h"
    ),
    "ttl of no sense": (
        with_system({**EPHEMERAL, "ttl": 5}), "system[0].cache_control.ttl", "5", "5m"
    ),
    "scope": (
        with_system({**EPHEMERAL, "scope": "world"}),
        "system[0].cache_control.scope", "world", "global, org, session",
    ),
    "unknown key": (
        with_system({**EPHEMERAL, "tll": "5m"}), "system[0].cache_control.tll", "5m", "ttl"
    ),
    "a longer ttl after a shorter": (
        with_system(EPHEMERAL, HOUR), "system[1].cache_control.ttl", "1h", "at most 5m"
    ),
    "a wider scope after a narrower": (
        with_system({**EPHEMERAL, "scope": "org"}, {**EPHEMERAL, "scope": "global"}),
        "system[1].cache_control.scope", "global", "org, session",
    ),
    "an empty block": (
        {**messages_body("r"), "system": [{"type": "text", "text": "", "cache_control": HOUR}]},
        "system[0].cache_control", "ephemeral", "text",
    ),
    "on a message": (
        {**messages_body("r"), "messages": [{**EPHEMERAL, "role": "user", "content": "x",
                                             "cache_control": EPHEMERAL}]},
        "messages[0].cache_control", "ephemeral", "content blocks",
    ),
    "not an object": (
        {**messages_body("r"), "cache_control": "5m"}, "cache_control", "5m", "object"
    ),
    "inside metadata": (
        {**messages_body("r"), "metadata": {"cache_control": EPHEMERAL}},
        "metadata.cache_control", "ephemeral", "top level",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_refused(api, case, stream):
    body, path, value, allowed = BAD_MESSAGES[case]
    before = api.metrics("vllm:request_success_total")
    with pytest.raises(anthropic.BadRequestError) as refused:
        api.anthropic().messages.create(
            **{k: body[k] for k in ("model", "max_tokens", "messages")},
            extra_body={**body, "stream": stream},
        )
    reply = refused.value.response
    assert reply.status_code == 400
    error = reply.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    message = error["error"]["message"]
    assert message.startswith(f"{path}: ")
    assert value in message
    assert allowed in message.partition("allowed: ")[2]
    assert api.metrics("vllm:request_success_total") == before


# What must not change


INTERNALS = re.compile(rb"cachescope|nonce|max_offload_tokens|[0-9a-f]{32}", re.I)


@pytest.mark.parametrize("stream", [False, True])
def test_no_response_shows_how_it_is_done(api, stream):
    forged = {"kv_transfer_params": {"cachescope": {"spans": []}}}
    for path, body in (
        ("/v1/messages", {**messages_body("inside"), **forged}),
        ("/v1/chat/completions", {**chat_body("inside"), **forged}),
        ("/v1/completions", {"model": MODEL, "prompt": text("inside"), "max_tokens": 4, **forged}),
        (
            "/v1/responses",
            {"model": MODEL, "input": text("inside"), "max_output_tokens": 4, **forged},
        ),
    ):
        reply = api.post(path, {**body, "stream": stream})
        assert reply.status_code == 200, reply.text
        # vLLM's own ids are 32 hexadecimal digits, too; they come after a prefix.
        raw = re.sub(rb"\b(chatcmpl|cmpl|msg|resp|rs|item)[-_][0-9a-f]{16,32}", b"", reply.content)
        raw = re.sub(rb'"id":"[^"]*"', b"", raw)
        raw = re.sub(rb'"(item_id|request_id)":"[^"]*"', b"", raw)
        assert not INTERNALS.search(raw), INTERNALS.search(raw)
        assert b'"kv_transfer_params":{' not in raw


PLAIN = [
    ("/v1/messages", {"messages": [{"role": "user", "content": text("plain")}], "max_tokens": 3}),
    (
        "/v1/messages",
        {
            "system": text("plain system"),
            "messages": [
                {"role": "user", "content": [block("plain question")]},
                {"role": "assistant", "content": [block("plain answer", 10)]},
                {"role": "user", "content": "é “quoted” — ☂"},
            ],
            "max_tokens": 3,
            "stop_sequences": ["e"],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": text("plain")}],
            "max_tokens": 3,
            "logprobs": True,
            "top_logprobs": 3,
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": text("plain")}], "max_tokens": 3, "n": 2},
    ),
    ("/v1/completions", {"prompt": text("plain"), "max_tokens": 3, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": [text("plain"), "short"], "max_tokens": 3}),
    ("/v1/responses", {"input": text("plain"), "max_output_tokens": 3}),
    ("/v1/messages", {"messages": [], "max_tokens": 3}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/chat/completions", {"messages": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}),
    ("/v1/completions", {"prompt": "x", "model": "unknown"}),
    ("/v1/responses", {"input": 5}),
]

_VARIES = [
    (rb'"(id|item_id|request_id|call_id)":"[^"]*"', rb'"\1":"*"'),
    (rb'"(created|created_at|completed_at|expires_at)":[0-9.]+', rb'"\1":0'),
    # A hash of the server's whole configuration.
    (rb'"system_fingerprint":"[^"]*"', rb'"system_fingerprint":"*"'),
    (rb'"usage":\{([^{}]|\{[^{}]*(\{[^{}]*\}[^{}]*)*\})*\}', rb'"usage":*'),
]


def stable(raw: bytes) -> bytes:
    """Return ``raw`` without what differs from one request to the next, and without its usage."""
    for pattern, replacement in _VARIES:
        raw = re.sub(pattern, replacement, raw)
    return raw


def test_requests_that_use_no_cache_field_are_served_as_ever(api, plain_url):
    def post(url, path, body):
        reply = httpx.post(f"{url}{path}", json=body, timeout=60)
        return reply.status_code, reply.headers["content-type"], stable(reply.content)

    for path, fields in PLAIN:
        bodies = [{"model": MODEL, "temperature": 0.0, **fields}]
        bodies.append({**bodies[0], "stream": True})
        if path.endswith("completions"):
            bodies.append({**bodies[1], "stream_options": {"include_usage": True}})
        for body in bodies:
            ours, theirs = set(), set()
            # A busy server may send two tokens in one event, so one stream may be cut in several
            # ways; both servers know the same ways.
            for _ in range(20 if body.get("stream") else 1):
                ours.add(post(api.url, path, body))
                theirs.add(post(plain_url, path, body))
                if ours & theirs:
                    break
            assert ours & theirs, (path, body, ours, theirs)

    for raw in (b"", b"{", b"[]", b"5", b'{"messages": [}', b"\xff"):
        headers = {"content-type": "application/json"}
        for path in ("/v1/messages", "/v1/chat/completions", "/v1/responses"):
            ours, theirs = (
                httpx.post(f"{url}{path}", content=raw, headers=headers)
                for url in (api.url, plain_url)
            )
            assert (ours.status_code, stable(ours.content)) == (
                theirs.status_code,
                stable(theirs.content),
            )


# Metrics


def test_the_metrics_are_the_usages_summed(api):
    labels = ("outcome",)
    name = "cachescope_prompt_tokens_total"
    before = api.metrics(name, *labels)

    asks = [(ask, f"metered {i % 5}", f"key {i % 2}") for i in range(4) for ask in ASKS]
    asks += [
        (ask_chat, "metered 1", "key 0"),
        (ask_messages, "metered once", "key 0"),
        (stream_messages, "metered once", "key 0"),
    ]
    random.Random(0).shuffle(asks)
    with ThreadPoolExecutor(6) as pool:
        usages = list(pool.map(lambda ask: ask[0](api, ask[1], ask[2]), asks[: len(asks) // 2]))
        api.empty_device()
        usages += pool.map(lambda ask: ask[0](api, ask[1], ask[2]), asks[len(asks) // 2 :])
    usages.append(ask_chat(api, "metered, three choices", n=3))
    usages.append(ask_chat(api, "metered, three choices", n=3))
    stopped = messages_body("metered, stopped", max_tokens=200, stop_sequences=["e", "a", "o"])
    usages.append(of_messages(api.anthropic().messages.create(**stopped).usage))
    prewarmed = messages_body("metered, prewarmed", max_tokens=0)
    usages.append(of_messages(api.anthropic().messages.create(**prewarmed).usage))

    expected = Counter(
        read=sum(counts.read for counts in usages),
        created=sum(counts.created for counts in usages),
        uncached=sum(counts.uncached for counts in usages),
    )

    def sums(samples):
        found = Counter()
        for (outcome,), tokens in samples.items():
            found["read" if outcome.startswith("read_") else outcome] += tokens
        return found

    want = sum(expected.values())
    found = Counter()
    for _ in range(100):
        found = sums(api.metrics(name, *labels)) - sums(before)
        if sum(found.values()) >= want:
            break
    assert found == expected
    since = api.metrics(name, *labels) - before
    assert since["read_device",] > 0
    assert since["read_cpu",] > 0


def test_the_metrics_tell_scope_and_lifetime(api):
    name = "cachescope_prompt_tokens_total"
    before = api.metrics(name, "outcome", "scope", "ttl")
    body = messages_body("labelled")
    body["system"][0]["cache_control"] = {**HOUR, "scope": "global"}
    counts = of_messages(api.anthropic(NAMED_KEY).messages.create(**body).usage)
    expected = Counter(
        {
            ("created", "global", "1h"): counts.long,
            ("created", "org", "5m"): counts.short,
            ("uncached", "org", "5m"): counts.uncached,
        }
    )
    total = before + expected
    found = api.await_metrics(name, ("outcome", "scope", "ttl"), total)
    assert found - before == expected


def test_each_metric_says_whose_it_is_and_counts_what_it_says(api):
    api.post("/v1/messages", messages_body("metrics"), "key of the metrics").raise_for_status()
    text = httpx.get(f"{api.url}/metrics", timeout=60).text
    shown = [f for f in text_string_to_metric_families(text) if f.name.startswith("cachescope_")]
    readme = README.read_text()
    by_name = {metric.name: metric for metric in METRICS}
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    for family in shown:
        metric = by_name[family.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert f"`{metric.shown}`" in readme
        for sample in family.samples:
            assert sample.name in [family.name + suffix for suffix in suffixes[metric.kind]]
            assert sample.labels.pop("model_name") == MODEL
            assert sample.labels.pop("engine") in ("0", NO_ENGINE)
            sample.labels.pop("le", None)
            assert set(sample.labels) == set(metric.labels)
    # This server keeps no ledger, and has no store in which sessions are noted.
    assert set(by_name) - {LEDGER_RECORDS.name, SESSION_NOTES.name} == {
        family.name for family in shown
    }


def test_idle_memory_is_given_back_and_the_gauges_say_so(api):
    labels = ("tier", "ttl")
    ask_messages(api, "to be dropped")
    for tier in ("device", "cpu"):
        assert api.metrics("cachescope_resident_bytes", *labels)[tier, "5m"] > 0
    evicted = api.metrics("cachescope_evictions_total", "tier", "reason")
    entries = api.metrics("cachescope_resident_entries", *labels)
    api.clock.advance(100_000)
    # Nothing runs; the sweep does.
    assert api.await_metrics("cachescope_resident_entries", labels, Counter()) == Counter()
    assert api.await_metrics("cachescope_resident_bytes", labels, Counter()) == Counter()
    since = api.metrics("cachescope_evictions_total", "tier", "reason") - evicted
    for tier in ("device", "cpu"):
        held = sum(count for (where, _), count in entries.items() if where == tier)
        assert since[tier, "ttl"] == held


def test_nothing_that_these_tests_do_is_unexplained(api):
    assert sum(api.metrics("cachescope_unexplained_tokens_total").values()) == 0
