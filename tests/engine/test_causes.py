"""Why tokens were not read that an earlier request had: each cause brought about for real, and
named in the list of breaks and in the metrics alike."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.engine.bodies import EPHEMERAL, block, conversation, session, text
from tests.engine.engine import BLOCK, BLOCK_BYTES
from tests.engine.server import (
    MODEL,
    OPERATOR_TOKEN,
    REPAIRED_KEY,
    SMALL,
    Api,
    breaks,
    named,
    serve_scoped,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("operator") / "diffs"


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory, directory) -> Iterator[Api]:
    """A server with little room, which writes diffs."""
    scratch = tmp_path_factory.mktemp("small")
    config = {"cpu_bytes": 24 * BLOCK_BYTES, "diffs": {"directory": str(directory)}}
    options = (*SMALL, "--trust-request-chat-template")
    with serve_scoped(tiny_model, scratch, *options, **config) as api:
        yield api


def send(api: Api, key: str, body: dict, name: str = "s") -> dict:
    answer = api.post("/v1/messages", body, key, **session(name))
    assert answer.status_code == 200, answer.text
    return answer.json()


def fill(api: Api, name: str, prompts: int, **mark: object) -> None:
    """Have others use the caches."""
    for i in range(prompts):
        send(api, "key of the many", conversation(f"{name} {i}", 1, 500, **mark), f"{name} {i}")


def test_the_memory_was_full(small: Api) -> None:
    key = "key of the evicted"
    send(small, key, conversation("evicted", cache_control=EPHEMERAL))
    fill(small, "filler", 8, cache_control=EPHEMERAL)
    asked = conversation("evicted", 2, cache_control=EPHEMERAL)
    seen = named(small, key, lambda: send(small, key, asked))
    assert (seen["cause"], seen["kind"], seen["expected"]) == ("evicted", "continuation", False)
    assert seen["engine"][0]["tier"] in ("device", "cpu")
    assert "memory" in seen["suggestion"]


def test_no_breakpoint_covered_it(small: Api) -> None:
    """What is not covered lives on the device only, and goes where that is full."""
    key = "key of the uncovered"
    send(small, key, conversation("uncovered"))
    for i in range(8):
        # Of these nothing is covered but a few words, so that the memory behind has room.
        asked = conversation(f"bare {i}", 1, 800)
        asked["system"] = [block(f"bare {i}", 3, cache_control=EPHEMERAL)]
        send(small, "key of the many", asked, f"bare {i}")
    seen = named(small, key, lambda: send(small, key, conversation("uncovered", 2)))
    assert seen["cause"] == "never_stored"
    assert seen["engine"][0]["detail"] == "not covered by a breakpoint"


def test_it_was_shorter_than_a_block(small: Api) -> None:
    key = "key of the brief"
    send(small, key, conversation("brief", words=8))
    seen = named(small, key, lambda: send(small, key, conversation("brief", 2, words=8)))
    assert seen["cause"] == "never_stored"
    assert seen["engine"][0]["detail"] == f"shorter than one block of {BLOCK} tokens"


def test_the_cache_was_reset(small: Api) -> None:
    key = "key of the reset"
    body = conversation("reset", cache_control=EPHEMERAL)
    send(small, key, body)
    reset = {"reset_external": True}
    httpx.post(f"{small.url}/reset_prefix_cache", params=reset, timeout=60).raise_for_status()
    seen = named(small, key, lambda: send(small, key, body))
    assert (seen["cause"], seen["engine"][0]["detail"]) == ("evicted", "the cache was reset")


def test_nobody_without_a_session_can_read_what_has_session_scope(small: Api) -> None:
    key = "key of the nameless"
    body = conversation("nameless", cache_control=EPHEMERAL | {"scope": "session"})
    small.post("/v1/messages", body, key)
    seen = named(small, key, lambda: small.post("/v1/messages", body, key))
    assert seen["cause"] == "never_stored"
    assert "named no session" in seen["engine"][0]["detail"]


def test_log_probabilities_of_the_prompt_are_computed(small: Api) -> None:
    key = "key of the curious"
    before = breaks(small, key)
    asked = {"model": MODEL, "prompt": "tide " * 600, "max_tokens": 1, "prompt_logprobs": 1}
    for _ in range(2):
        answer = small.post("/v1/completions", asked, key)
        assert answer.status_code == 200, answer.text
    # The client has its reasons: it is no break.
    assert breaks(small, key) == before
    assert sum(small.metrics("cachescope_unexplained_tokens_total").values()) == 0


def test_a_request_that_is_given_up_is_remembered_all_the_same(small: Api) -> None:
    key = "key of the impatient"
    body = conversation("impatient", cache_control=EPHEMERAL) | {"max_tokens": 2000}
    headers = {"x-api-key": key, **session("s")}
    asked = body | {"stream": True}
    with httpx.stream("POST", f"{small.url}/v1/messages", json=asked, headers=headers) as answer:
        next(answer.iter_lines())
    later = conversation("impatient", 2, cache_control=EPHEMERAL)
    usage = send(small, key, later)["usage"]
    assert usage["cache_read_input_tokens"] > 0
    assert breaks(small, key) == []
    small.clock.advance(400)
    seen = named(small, key, lambda: send(small, key, later))
    assert (seen["cause"], seen["kind"]) == ("expired", "retry")
    assert seen["engine"][0]["ttl_s"] == 300


def test_a_head_in_two_scopes(small: Api) -> None:
    """Chat shares all of it in the organisation; Messages ends that within a block."""
    key, name = "key of the straddling", session("s")
    system, question = text("straddling", 60), text("straddling question", 400)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": MODEL, "max_tokens": 2}
    small.post("/v1/chat/completions", body | {"messages": chat}, key, **name).raise_for_status()
    parts = [
        {"type": "text", "text": said, "cache_control": EPHEMERAL | {"scope": scope}}
        for said, scope in ((system, "org"), (question, "session"))
    ]
    asked = body | {"system": parts[:1], "messages": [{"role": "user", "content": parts[1:]}]}
    seen = named(small, key, lambda: send(small, key, asked))
    assert (seen["cause"], seen["expected"]) == ("scope_changed", False)
    assert "scope" in seen["suggestion"]


def test_a_tool_stands_where_the_template_renders_it(small: Api) -> None:
    """The demo's template renders tools behind the system text."""
    key = "key of the toolmaker"
    body = conversation("toolmaker", cache_control=EPHEMERAL)
    body["tools"] = [
        {"name": name, "description": text(name, 120), "input_schema": {"type": "object"}}
        for name in ("weigh", "gauge")
    ]
    send(small, key, body)
    body["tools"][1]["description"] += " Gently."
    seen = named(small, key, lambda: send(small, key, body))
    (system,) = body["system"]
    assert (seen["cause"], seen["where"]["path"]) == ("tools_changed", "tools[1]")
    read = seen["prompt_tokens"] - sum(seen["uncached"].values())
    assert read > 0 and read <= seen["where"]["token"] < read + BLOCK
    # In front of a tool that changes, a system prompt that does is the cause.
    body["tools"][0]["description"] += " Gently."
    system["text"] = f"{system['text']} Of late."
    seen = named(small, key, lambda: send(small, key, body))
    assert (seen["cause"], seen["where"]["path"]) == ("system_changed", "system[0]")
    read = seen["prompt_tokens"] - sum(seen["uncached"].values())
    assert read > 0 and read <= seen["where"]["token"] < read + BLOCK
    assert seen["changes"][1]["names"] == ["weigh"]
    assert seen["suggestion"].startswith("Move the value that varies in system[0]")
    # Also where both begin with what changes, in one block.
    body["tools"][0]["description"] += " Slowly."
    system["text"] = f"Of late. {system['text']}"
    seen = named(small, key, lambda: send(small, key, body))
    assert (seen["cause"], seen["where"]["token"]) == ("system_changed", 0)


FORGETFUL = """
{%- for message in messages -%}
    <|im_start|>{{ message.role }}\n
    {%- if message.role == 'assistant' and messages[-1].role == 'user' and not loop.last -%}
        {{ message.content.split('</think>')[-1] }}
    {%- else -%}
        {{ message.content }}
    {%- endif -%}
    <|im_end|>\n
{%- endfor -%}
"""
"""A chat template that leaves out the thoughts of earlier turns once the user says more."""


def test_new_turns_behind_history_that_is_rendered_differently(small: Api, tiny_model) -> None:
    key, said = "key of the forgetful", text("forgetful question", 200)
    turns = [
        {"role": "user", "content": text("forgetful", 300)},
        {"role": "assistant", "content": text("thoughts", 400) + "</think>I see."},
        {"role": "tool", "tool_call_id": "c", "content": text("found", 100)},
    ]
    body = {"model": MODEL, "max_tokens": 2, "chat_template": FORGETFUL}

    def ask() -> None:
        small.post("/v1/chat/completions", body | {"messages": turns}, key).raise_for_status()

    ask()
    turns += [{"role": "assistant", "content": "So it is."}, {"role": "user", "content": said}]
    seen = named(small, key, ask)
    assert seen["cause"] == "rendered_differently"
    new = len(AutoTokenizer.from_pretrained(tiny_model)(said)["input_ids"])
    assert seen["uncached"]["new_content"] == pytest.approx(new, rel=0.1)


DATED = """\
{{- 'Today is ' + today | default('some day') + '.' -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- if message.role == 'user' and 'Now: ' in message.content -%}
        {{- raise_exception('tell me the time elsewhere') -}}
    {%- endif -%}
{%- endfor -%}
"""
"""A chat template that has the date in front, and refuses what a repair may move."""


def dated(api: Api, key: str, name: str, system: str, **fields: object) -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text(name, 300)}]
    asked = {"model": MODEL, "max_tokens": 2, "temperature": 0.0, "messages": messages}
    asked["return_token_ids"] = True
    answer = api.post("/v1/chat/completions", asked | fields, key, **session(name))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_parameter_of_the_template_is_latched(small: Api) -> None:
    def ask(key: str, *days: str | None) -> list[dict]:
        return [
            dated(
                small,
                key,
                "dated",
                "You help.",
                chat_template=DATED,
                chat_template_kwargs={} if day is None else {"today": day},
            )
            for day in days
        ]

    first, second, third = ask(REPAIRED_KEY, "Monday", "Tuesday", None)
    (hand,) = ask("key of the dated by hand", "Monday")
    (other,) = ask("key of the dated", "Tuesday")
    assert first["prompt_token_ids"] == hand["prompt_token_ids"] != other["prompt_token_ids"]
    for found in (second, third):
        assert found["prompt_token_ids"] == hand["prompt_token_ids"]
        assert found["choices"][0]["message"] == hand["choices"][0]["message"]
        (repair,) = found["usage"]["prompt_repairs"]
        assert repair["kind"] == "latched_field"
        assert repair["saved_tokens"] == found["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert repair["saved_tokens"] > BLOCK


def test_what_a_template_refuses_repaired_is_served_unrepaired(small: Api) -> None:
    def counted() -> list[Counter[tuple[str, ...]]]:
        names = {"cachescope_repairs_total": "kind", "cachescope_repair_failures_total": "reason"}
        return [small.metrics(name, label) for name, label in names.items()]

    before = counted()
    for _ in range(2):
        found = dated(small, REPAIRED_KEY, "refused", "Now: noon\nYou help.", chat_template=DATED)
        assert "prompt_repairs" not in found["usage"]
    after = counted()
    assert after[0] == before[0]
    # The second request was served as it came at once.
    assert after[1] - before[1] == {("refused",): 1}


def test_each_prompt_of_a_request_is_explained(small: Api) -> None:
    key = "key of the several"
    asked = {"model": MODEL, "prompt": [text(f"several {i}", 60) for i in range(3)]}
    for _ in range(2):
        small.post("/v1/completions", asked | {"max_tokens": 1}, key).raise_for_status()
    # The text of a prompt is another prompt once a template has rendered it.
    asked = {"model": MODEL, "input": asked["prompt"][0], "max_output_tokens": 1}
    small.post("/v1/responses", asked, key).raise_for_status()
    assert breaks(small, key) == []
    assert sum(small.metrics("cachescope_unexplained_tokens_total").values()) == 0


def as_operator(api: Api) -> list[dict]:
    return breaks(api, OPERATOR_TOKEN)


def test_diffs_are_written_for_the_operator(small: Api, directory: Path) -> None:
    key = "key of the changing"
    first = conversation("changing", cache_control=EPHEMERAL)
    tool = {"name": "weigh", "input_schema": {"type": "object", "properties": {"grams": {}}}}
    first["tools"] = [tool]
    first["system"].append({"type": "text", "text": "Mail to boss@example.org on Monday."})
    send(small, key, first)
    first["system"][-1]["text"] = "Mail to chief@example.org on Friday."
    named(small, key, lambda: send(small, key, first))
    tool["input_schema"]["properties"] = {"ounces": {}}
    seen = named(small, key, lambda: send(small, key, first))
    assert "diff" not in seen
    schema, system = as_operator(small)[:2]
    assert (schema["cause"], system["cause"]) == ("tools_changed", "system_changed")
    text = (directory / schema["diff"]).read_text()
    assert '-      "grams"' in text and '+      "ounces"' in text
    text = (directory / system["diff"]).read_text()
    assert "-Mail to [redacted] on Monday." in text and "+Mail to [redacted] on Friday." in text
    head = json.loads(text.splitlines()[0].removeprefix("# "))
    assert (head["org"], head["at"]) == (system["org"], pytest.approx(system["at"], abs=1e-3))
    assert (directory / system["diff"]).stat().st_mode & 0o777 == 0o600


def test_a_new_server_does_not_know_the_old_ones_answers(small: Api, tiny_model, tmp_path) -> None:
    """Server and engine go together: there is nothing left to compare with, and no break."""
    key = "key of the survivor"
    body = conversation("survivor", cache_control=EPHEMERAL)
    old = send(small, key, body)["id"]
    with serve_scoped(tiny_model, tmp_path, *SMALL) as api:
        asked = body | {"diagnostics": {"previous_message_id": old}}
        answer = send(api, key, asked)
        reason = answer["diagnostics"]["cache_miss_reason"]
        assert reason == {"type": "previous_message_not_found"}
        assert answer["usage"]["cache_read_input_tokens"] == 0
        assert breaks(api, key) == []


# The words of OpenAI's client for it. On Chat they come on top of what the client's types know.


def compare(response_id: str) -> dict:
    return {"prompt_cache_options": {"comparison_response_id": response_id}}


def chat(client: openai.OpenAI, system: str, **options: object):
    messages = [
        {"role": "system", "content": system * 60},
        {"role": "user", "content": "What is the tide? " * 60},
    ]
    return client.chat.completions.create(model=MODEL, max_tokens=3, messages=messages, **options)


@pytest.mark.parametrize("usage", [None, False, True])
def test_a_streamed_chat_says_what_changed(small: Api, usage: bool | None) -> None:
    client = small.openai(f"key of the streaming {usage}")
    first = chat(client, "Be brief. ")
    options: dict = {} if usage is None else {"stream_options": {"include_usage": usage}}
    cases = [
        ("Be brief. ", first.id, {"type": "cache_hit"}),
        ("Be very brief. ", first.id, {"type": "cache_miss", "reason": "input_changed"}),
        ("Be brief. ", "chatcmpl-unknown", {"type": "comparison_response_not_found"}),
    ]
    for system, named_id, expected in cases:
        chunks = list(chat(client, system, stream=True, extra_body=compare(named_id), **options))
        said = [
            chunk.model_extra["prompt_cache_diagnostics"]
            for chunk in chunks
            if "prompt_cache_diagnostics" in (chunk.model_extra or {})
        ]
        assert said and all(expected.items() <= one.items() for one in said)
        # Where there is a chunk with the usage, it says it too.
        assert len(said) == (2 if usage else 1)
        assert (chunks[-1].usage is not None) == bool(usage)


def test_a_chat_says_what_changed(small: Api) -> None:
    client = small.openai("key of the whole")
    first = chat(client, "Be kind. ")
    changed = chat(client, "Be very kind. ", extra_body=compare(first.id))
    said = changed.model_extra["prompt_cache_diagnostics"]
    assert (said["type"], said["reason"]) == ("cache_miss", "input_changed")
    assert said["cache_missed_tokens"] > 0


def test_a_streamed_response_says_what_changed(small: Api) -> None:
    client = small.openai("key of the responding")
    asked = {"model": MODEL, "max_output_tokens": 3, "input": "tide " * 600}
    first = client.responses.create(instructions="Be brief. " * 40, **asked)
    with client.responses.stream(
        instructions="Be very brief. " * 40, extra_body=compare(first.id), **asked
    ) as stream:
        final = stream.get_final_response()
    assert final.prompt_cache_diagnostics.type == "cache_miss"
    assert final.prompt_cache_diagnostics.reason == "input_changed"
