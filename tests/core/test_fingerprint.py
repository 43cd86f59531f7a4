import json
import math
import random
import sys
import time
import tracemalloc
from array import array
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.agent_session import TTLS, Agent, Client, words
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.part_kind import Role, Trait
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.wire import anthropic, openai_chat

SECRET = b"a secret of the operator"


def deep_size(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of an object and all it refers to, each object once; enum members belong to no one."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, Enum | type) or value is None:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(deep_size(k, seen) + deep_size(v, seen) for k, v in value.items())
    if isinstance(value, tuple | list):
        return size + sum(deep_size(item, seen) for item in value)
    if is_dataclass(value):
        return size + sum(deep_size(getattr(value, f.name), seen) for f in fields(value))
    return size


def strings_of(value: Any) -> list[str]:
    """All text that can be read in a fingerprint."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes):
        return [value.decode("latin-1")]
    if isinstance(value, dict):
        return [s for item in value.items() for s in strings_of(item)]
    if isinstance(value, tuple | list | array):
        return [s for item in value for s in strings_of(item)]
    if is_dataclass(value):
        return [s for f in fields(value) for s in strings_of(getattr(value, f.name))]
    return []


def fingerprint(*parts: Part, **request: Any) -> Fingerprint:
    made = PromptRequest(Protocol.MESSAGES, "m", tuple(parts), **request)
    return Fingerprinter(SECRET)(made)


def message(content: Any, role: str = "user", path: str = "messages[0].content[0]") -> Part:
    return Part(Region.MESSAGES, path, content, role)


def test_no_text_is_kept() -> None:
    agent = Agent("private").turn().turn()
    agent.params = {"chat_template_kwargs": {"note": "whispered words"}}
    body = agent.body()
    request = anthropic.read(body, TTLS)
    kept = "\n".join(strings_of(Fingerprinter(SECRET)(request)))
    texts = [s for part in request.parts for s in strings_of(part.content) if len(s) > 12]
    assert len(texts) > 50
    for text in [*texts, "whispered words"]:
        for i in range(0, len(text) - 12, 12):
            assert text[i : i + 12] not in kept
    # What a report has to name is readable.
    assert "MultiEdit" in kept and "chat_template_kwargs.note" in kept and "main-model" in kept


def test_a_session_of_24_tools_and_60_messages_fits_20_kilobytes() -> None:
    agent = Agent("size", scale=5.2)
    while len(agent.messages) < 60:
        agent.turn()
    body = agent.body()
    assert len(body["tools"]) == 24 and len(json.dumps(body)) > 390_000
    found = Fingerprinter(SECRET)(anthropic.read(body, TTLS))
    assert deep_size(found) <= 20_000
    # What the store counts is about what it takes.
    assert 0.7 <= found.nbytes / deep_size(found) <= 1.5


def test_secrets_separate() -> None:
    request = anthropic.read(Agent("a").body(), TTLS)
    one, other = Fingerprinter(b"one")(request), Fingerprinter(b"other")(request)
    assert one.hashes != other.hashes and one.ends == other.ends
    assert all(one.hash(i) != other.hash(i) for i in range(len(one)))
    assert one.pieces != other.pieces and one.edges != other.edges


def test_the_memo_is_bounded_and_changes_nothing() -> None:
    small, large = Fingerprinter(SECRET, memo_tools=3), Fingerprinter(SECRET)
    agent = Agent("memo")
    request = anthropic.read(agent.body(), TTLS)
    first = small(request)
    assert small.remembered_tools == 3
    assert small(request).tools == first.tools == large(request).tools == large(request).tools
    assert large.remembered_tools == 24


def test_messages_are_remembered_within_bounds() -> None:
    small, large = Fingerprinter(SECRET, memo_bytes=9_000), Fingerprinter(SECRET)
    request = anthropic.read(Agent("parts").body(), TTLS)
    fingerprints = [made(request) for made in (small, small, large, large)]
    assert small.remembered_groups == 2 < large.remembered_groups
    assert len({(one.edges, one.pieces, one.hashes) for one in fingerprints}) == 1


def test_key_order_counts_and_is_told_apart() -> None:
    made = Fingerprinter(SECRET)
    tool = Agent("order").tools[0]
    turned = {key: tool[key] for key in reversed(tool)}
    nested = dict(tool, input_schema=dict(reversed(tool["input_schema"].items())))
    fingerprints = [
        made(PromptRequest(Protocol.MESSAGES, "m", (Part(Region.TOOLS, "tools[0]", t),))).tools[0]
        for t in (tool, turned, nested)
    ]
    assert len({p.ordered for p in fingerprints}) == 3
    assert len({p.unordered for p in fingerprints}) == 1
    assert fingerprints[0].field_map() == fingerprints[2].field_map()
    assert set(fingerprints[0].fields) == {"name", "description", "input_schema"}


def test_openai_functions_are_named_and_split_into_fields() -> None:
    function = {"name": "read", "description": "reads", "parameters": {"type": "object"}}
    nested = {"type": "function", "function": function}
    flat = {"type": "function", **function}
    builtin = {"type": "web_search"}
    found = fingerprint(
        *(Part(Region.TOOLS, f"tools[{i}]", t) for i, t in enumerate([nested, flat, builtin, 7]))
    )
    assert [tool.name for tool in found.tools] == ["read", "read", "web_search", "?"]
    assert found.tools[0].field_map() == found.tools[1].field_map()
    assert found.tools[0].fields == ("type", "name", "description", "parameters")


def test_a_string_and_its_text_block_are_one_prompt() -> None:
    one = fingerprint(message("hello", path="messages[0].content"))
    for block in ({"type": "text", "text": "hello"}, {"text": "hello", "type": "input_text"}):
        assert fingerprint(message(block)).hashes == one.hashes
    assert fingerprint(message("hello", role="assistant")).hashes != one.hashes
    assert fingerprint(message({"type": "text", "text": "hello", "citations": []})).hashes != (
        one.hashes
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    ),
)
def test_equal_hashes_mean_equal_json(one: Any, other: Any) -> None:
    def json_of(value: Any) -> str:
        return json.dumps(value)

    def bare(value: Any) -> Any:
        """A bare text block stands for its text."""
        is_text = isinstance(value, dict) and value.get("type") in ("text",) and len(value) == 2
        return value["text"] if is_text and isinstance(value.get("text"), str) else value

    fingerprints = [fingerprint(message(value)) for value in (one, other, json.loads(json_of(one)))]
    same = json_of(bare(one)) == json_of(bare(other))
    assert (fingerprints[0].hashes == fingerprints[1].hashes) == same
    assert fingerprints[0].hashes == fingerprints[2].hashes


def test_strings_do_not_run_into_each_other() -> None:
    pairs = [{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "b:c"}, {"a1:": "bc"}, {}]
    hashes = {fingerprint(message(value)).hashes for value in pairs}
    assert len(hashes) == len(pairs)


def test_positions_and_sizes() -> None:
    found = Client().fingerprint(Agent("sizes").turn().body())
    assert len(found.hashes) == len(found) * HASH_BYTES
    assert found.counts == (24, 2, 5)  # the billing block is not in the prompt
    assert found.path(24) == "system[1]" and found.path(28) == "messages[1].content[0]"
    assert found.role(28) is Role.ASSISTANT and found.role(0) is Role.NONE
    assert found.has(28, Trait.STARTS) and not found.has(29, Trait.STARTS)
    assert list(found.ends) == sorted(found.ends)
    assert found.tokens == sum(found.size(i) for i in range(len(found)))
    assert [mark.path for mark in found.marks] == [
        "system[1].cache_control",
        "system[2].cache_control",
        "messages[2].content[0].cache_control",
    ]
    assert found.covered_tokens == found.tokens


def test_an_image_counts_as_an_image_and_not_as_its_base64() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 400_000}}
    assert fingerprint(message(image)).tokens == 1600


def test_parameters_are_kept_by_name_one_level_down() -> None:
    params = {
        "output_config": {"effort": "low", "format": None},
        "thinking": {},
        "tool_choice": "a",
    }
    found = fingerprint(params=params)
    assert sorted(found.params) == [
        "output_config.effort",
        "output_config.format",
        "thinking",
        "tool_choice",
    ]
    assert fingerprint(params={"x": {"b": [1, {"c": 1, "d": 2}]}}).params == (
        fingerprint(params={"x": {"b": [1, {"d": 2, "c": 1}]}}).params
    )


@pytest.mark.parametrize("value", ["\ud800 half a pair", {"\udfff": "\ud800"}, ["\udc80"]])
def test_half_surrogates(value: Any) -> None:
    found = fingerprint(message(value), params={"p": value})
    assert found.hashes == fingerprint(message(value), params={"p": value}).hashes
    assert found.hashes != fingerprint(message("?")).hashes
    Fingerprinter(SECRET)(PromptRequest(Protocol.MESSAGES, "\ud800" * 300, ()))
    tool = {"name": "\ud800" * 300, "description": "\udfff"}
    assert len(fingerprint(Part(Region.TOOLS, "tools[0]", tool)).tools[0].name) <= 100


def test_whatever_a_message_holds_it_is_remembered_as_itself() -> None:
    numbers = [0, 1, 1.0, True, 2**64, 2**64 + 1, -(2**64), float(2**64), math.inf]
    texts = ["1", "\ud800", "\udc80", "?", "null"]
    others = [None, [], {}, [[]], {"\ud800": 1}, {"?": 1}, nested(5000, "a"), nested(5000, "b")]
    made = Fingerprinter(SECRET)
    messages = [message([value]) for value in (*numbers, *texts, *others)]
    first = [made(PromptRequest(Protocol.CHAT, "m", (part,))).hashes for part in messages]
    again = [made(PromptRequest(Protocol.CHAT, "m", (part,))).hashes for part in messages]
    alone = [
        Fingerprinter(SECRET)(PromptRequest(Protocol.CHAT, "m", (part,))).hashes
        for part in messages
    ]
    assert first == again == alone and len(set(first)) == len(messages) == made.remembered_groups


def test_numbers_json_does_not_have() -> None:
    hashes = {fingerprint(message([value])).hashes for value in (math.nan, math.inf, -math.inf, 0)}
    assert len(hashes) == 4


def nested(depth: int, leaf: Any) -> Any:
    value = leaf
    for i in range(depth):
        value = [value] if i % 2 else {"k": value}
    return value


def test_any_depth() -> None:
    hashes = {fingerprint(message(nested(100_000, leaf))).hashes for leaf in ("a", "b", 1, None)}
    assert len(hashes) == 4
    tools = [
        fingerprint(Part(Region.TOOLS, "tools[0]", {"name": "t", "input_schema": nested(9_000, x)}))
        for x in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1})
    ]
    assert tools[0].hashes != tools[1].hashes
    assert tools[0].tools[0].unordered == tools[1].tools[0].unordered
    assert tools[0].tools[0].unordered != tools[2].tools[0].unordered


def hostile() -> dict[str, PromptRequest]:
    tools = tuple(
        Part(Region.TOOLS, f"tools[{i}]", {"name": f"tool{i}", "input_schema": {"type": "object"}})
        for i in range(100_000)
    )
    big = "x" * 10_000_000
    wide = {f"key{i}": i for i in range(300_000)}
    messages = tuple(message(f"m{i}", "user", f"messages[{i}].content") for i in range(100_000))
    return {
        "100,000 tools": PromptRequest(Protocol.MESSAGES, "m", tools),
        "100,000 messages": PromptRequest(Protocol.MESSAGES, "m", messages),
        "10 MB text": PromptRequest(Protocol.MESSAGES, "m", (message(big),)),
        "10 MB name": PromptRequest(
            Protocol.MESSAGES, big, (Part(Region.TOOLS, "tools[0]", {"name": big}),)
        ),
        "10 MB system": PromptRequest(
            Protocol.MESSAGES, "m", (Part(Region.SYSTEM, "system", big),)
        ),
        "10 MB prompt": PromptRequest(
            Protocol.COMPLETIONS, "m", (Part(Region.MESSAGES, "prompt", big),)
        ),
        "300,000 fields": PromptRequest(
            Protocol.MESSAGES, "m", (Part(Region.TOOLS, "tools[0]", wide),)
        ),
        "300,000 parameters": PromptRequest(
            Protocol.MESSAGES, "m", (), params={"chat_template_kwargs": wide}
        ),
        "deep": PromptRequest(Protocol.MESSAGES, "m", (message(nested(200_000, 1)),)),
    }


HOSTILE = hostile()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_cost_bounded_time_and_memory(name: str) -> None:
    client = Client()
    start = time.thread_time()
    found = client.fingerprinter(HOSTILE[name])
    again = client.fingerprinter(HOSTILE[name])
    client.store.observe(client.caller, found)
    client.store.observe(client.caller, again)
    # About as long as reading the body took; two minutes would be an attack.
    assert time.thread_time() - start < 10
    assert found.nbytes < 400_000
    assert deep_size(found) < 800_000
    assert again.hashes == found.hashes


def test_fingerprinting_keeps_no_more_than_the_fingerprint() -> None:
    made = Fingerprinter(SECRET, memo_tools=16, memo_bytes=40_000)
    requests = [anthropic.read(Agent(i, scale=0.2).body(), TTLS) for i in range(20)]
    tracemalloc.start()
    for request in requests:
        made(request)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200_000


@pytest.mark.parametrize("many", ["tools", "blocks", "messages"])
def test_what_is_remembered_takes_no_more_memory_than_it_may(many: str) -> None:
    def body(number: int) -> dict[str, Any]:
        blocks = [{"type": "text", "text": f"{number} {i}"} for i in range(500)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
        if many == "blocks":
            messages = [{"role": "user", "content": blocks}]
        elif many == "messages":
            messages = [{"role": "user", "content": [block]} for block in blocks]
        tools = [{"name": block["text"], "input_schema": {"type": "object"}} for block in blocks]
        tools = tools if many == "tools" else []
        return {"model": "m", "max_tokens": 1, "tools": tools, "messages": messages}

    made = Fingerprinter(SECRET, memo_tools=16, memo_bytes=2_000_000)
    requests = [anthropic.read(body(number), TTLS) for number in range(40)]
    tracemalloc.start()
    for request in requests:
        made(request)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.4 * 2_000_000 < kept < 1.2 * 2_000_000


def test_a_folded_tail_still_counts() -> None:
    parts = HOSTILE["100,000 tools"].parts
    other = (*parts[:-1], Part(Region.TOOLS, "tools[99999]", {"name": "other"}))
    made = Fingerprinter(SECRET)
    one = made(HOSTILE["100,000 tools"])
    two = made(PromptRequest(Protocol.MESSAGES, "m", other))
    assert len(one) == 513
    assert one.hash(511) == two.hash(511) and one.hash(512) != two.hash(512)


def test_pieces_find_the_place_inside_a_text() -> None:
    rng = random.Random(3)
    text = words(rng, 40_000)
    at = 25_000
    one = fingerprint(message(text))
    two = fingerprint(message(text[:at] + "#" + text[at:]))
    shared = 0
    while one.pieces_of(0)[shared * 8 : shared * 8 + 8] == two.pieces_of(0)[shared * 8 :][:8]:
        shared += 1
    assert shared * one.piece_tokens * 4 <= at < (shared + 1) * one.piece_tokens * 4


def tool_result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": "done", **fields}


def chat_call(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "Read", "arguments": arguments}
    return [{"id": "call_1", "type": "function", "function": function}]


USE = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (tool_result(), tool_result(content=[{"type": "text", "text": "done"}])),
        (tool_result(), tool_result(is_error=False)),
        (tool_result(), dict(reversed(tool_result().items()))),
        (USE, dict(reversed(USE.items()))),
        (chat_call('{"a": 1}'), chat_call('{ "a":1 }')),
        (chat_call('{"a": 1}'), [dict(reversed(chat_call('{"a": 1}')[0].items()))]),
    ],
)
def test_spellings_that_render_alike_are_one(one: Any, other: Any) -> None:
    assert fingerprint(message(one)).hashes == fingerprint(message(other)).hashes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (tool_result(), tool_result(content="undone")),
        (tool_result(), tool_result(is_error=True)),
        (tool_result(), tool_result(content=[{"type": "text", "text": "done"}] * 2)),
        (tool_result(), {**tool_result(), "type": "other"}),
        (USE, {**USE, "input": {"b": 2, "a": 1}}),
        (chat_call('{"a": 1, "b": 2}'), chat_call('{"b": 2, "a": 1}')),
        (chat_call("{"), chat_call("{ ")),
        (chat_call("[1]"), chat_call("1")),
    ],
)
def test_what_renders_otherwise_is_told_apart(one: Any, other: Any) -> None:
    assert fingerprint(message(one)).hashes != fingerprint(message(other)).hashes


def test_no_content_and_null_are_one_to_chat() -> None:
    made = Fingerprinter(SECRET)
    answer = {"role": "assistant", "tool_calls": chat_call("{}")}
    one, other = (
        made(
            openai_chat.read(
                {"model": "m", "messages": [{"role": "user", "content": "x"}, a]}, TTLS
            )
        )
        for a in (answer, {**answer, "content": None})
    )
    assert one.hashes == other.hashes and one.kinds == other.kinds and one.paths == other.paths


def test_media_count_what_models_spend_on_them_wherever_they_stand() -> None:
    data = {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000}
    for kind in ("image", "document"):
        block = {"type": kind, "source": data}
        nested = tool_result(content=[{"type": "text", "text": "Here:"}, block])
        for content in (block, nested):
            assert 1_500 < fingerprint(message(content)).tokens < 2_000
    text = {"type": "document", "source": {"type": "text", "data": "word " * 10_000}}
    assert fingerprint(message(text)).tokens > 12_000
