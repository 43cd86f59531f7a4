"""The demo's conversations: the same everywhere, well formed, and long enough to measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from demo.session import agent_session, to_chat
from tests.core.session_digest import digest

ROOT = Path(__file__).parents[2]


def test_the_same_in_every_process():
    code = (
        "from demo.session import agent_session\n"
        "from tests.core.session_digest import digest\n"
        "print(digest(agent_session(7)))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == digest(agent_session(7))


def test_each_layer_depends_on_its_own_argument_alone():
    one, other_seed, other_org = (
        agent_session(1, org="acme"),
        agent_session(2, org="acme"),
        agent_session(1, org="borealis"),
    )
    assert one.tools == other_seed.tools == other_org.tools
    assert one.system == other_seed.system
    assert one.system[0] == other_org.system[0]
    assert one.system[1] != other_org.system[1]
    assert one.messages != other_seed.messages
    assert one.messages == other_org.messages


@pytest.mark.parametrize("seed", range(5))
def test_messages_alternate_and_every_call_is_answered(seed):
    session = agent_session(seed)
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 20
    open_calls: list[str] = []
    answered = 0
    for message in session.messages:
        blocks = message["content"]
        if message["role"] == "user":
            results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
            assert results == open_calls
            answered += len(results)
        open_calls = [b["id"] for b in blocks if b["type"] == "tool_use"]
    assert open_calls == []
    assert answered >= 5


def test_tools_have_valid_schemas_and_calls_obey_them():
    session = agent_session(3, turns=60)
    schemas = {tool["name"]: tool["input_schema"] for tool in session.tools}
    assert len(schemas) == 24
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    calls = [b for m in session.messages for b in m["content"] if b["type"] == "tool_use"]
    assert len({call["id"] for call in calls}) == len(calls) > 0
    for call in calls:
        jsonschema.validate(call["input"], schemas[call["name"]])


def test_each_prompt_extends_the_one_before():
    session = agent_session(0, turns=6)
    for turn in range(1, 6):
        before, now = session.body(turn - 1), session.body(turn)
        assert now["messages"][: len(before["messages"])] == before["messages"]
        assert len(now["messages"]) == len(before["messages"]) + 2
        assert now["messages"][-1]["role"] == "user"
    with pytest.raises(IndexError):
        session.body(6)


def test_a_body_is_the_callers_to_change():
    session = agent_session(0)
    before = digest(session)
    body = session.body(19)
    body["messages"][-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
    body["system"].clear()
    body["tools"][0]["input_schema"].clear()
    assert digest(session) == before


def test_too_many_tools_are_refused():
    with pytest.raises(ValueError, match="60 exist"):
        agent_session(0, tools=61)


def test_long_enough_with_the_demo_tokenizer():
    from demo.model import SMALL, train_tokenizer

    tokenizer = train_tokenizer(SMALL.vocab, "<|im_end|>")

    def tokens(value: object) -> int:
        return len(tokenizer(json.dumps(value))["input_ids"])

    session = agent_session(0)
    assert tokens(session.system) > 3_000
    assert tokens(session.tools) > 3_000
    last = session.body(session.turns - 1)
    assert 15_000 < tokens(last) < SMALL.max_positions - 8_000


def test_to_chat_keeps_every_text_call_and_marker():
    body = agent_session(4).body(19)
    body["tools"][-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    body["system"][0]["cache_control"] = {"type": "ephemeral", "scope": "global"}
    results = [b for m in body["messages"] for b in m["content"] if b["type"] == "tool_result"]
    results[-1]["cache_control"] = {"type": "ephemeral", "ttl": "5m"}
    chat = to_chat(body)

    assert [t["function"]["name"] for t in chat["tools"]] == [t["name"] for t in body["tools"]]
    assert chat["tools"][-1]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
    assert chat["messages"][0] == {"role": "system", "content": body["system"]}

    texts = [p["text"] for m in chat["messages"][1:] for p in m["content"]]
    blocks = [b for m in body["messages"] for b in m["content"]]
    expected = [b.get("text", b.get("content")) for b in blocks if b["type"] != "tool_use"]
    assert texts == expected

    calls = [c for m in chat["messages"] for c in m.get("tool_calls", [])]
    uses = [b for b in blocks if b["type"] == "tool_use"]
    assert [(c["id"], c["function"]["name"]) for c in calls] == [(b["id"], b["name"]) for b in uses]
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [b["input"] for b in uses]

    results = [m for m in chat["messages"] if m["role"] == "tool"]
    assert [m["tool_call_id"] for m in results] == [b["id"] for b in uses]
    assert results[-1]["content"][0]["cache_control"] == {"type": "ephemeral", "ttl": "5m"}
