"""What a real server is told of ends by its clients, and by the shape of what they send."""

import random
from collections import Counter

import pytest

from tests.core.agent_session import words
from tests.engine.server import MODEL
from vllm_cachescope.metrics import ENDED_ENTRIES

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def room(api) -> None:
    """What other tests have left in memory expires: nothing is evicted here."""
    api.clock.advance(25 * 3600)


FOUND = "The handler of uploads is in src/upload.py, and it has no test of its own."


def ended(api) -> Counter[tuple[str, ...]]:
    return api.metrics(ENDED_ENTRIES.shown, "tier")


def asked(session: str, *messages: dict, **fields) -> dict:
    """Return the body of a request of a session."""
    return {
        "model": MODEL,
        "messages": list(messages),
        "session_id": session,
        "max_tokens": 60,
        **fields,
    }


def question(text: str) -> dict:
    return {"role": "user", "content": f"{text} {words(random.Random(text), 3000)}"}


def test_a_session_says_that_it_is_over(api) -> None:
    before = ended(api)
    body = asked("the last request", question("Goodbye?"), max_tokens=1, session_over=True)
    answer = api.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    wanted = answer.json()["usage"]["prompt_tokens"] // 128
    expected = before + Counter({("device",): wanted, ("cpu",): wanted})
    assert wanted and api.await_metrics(ENDED_ENTRIES.shown, ("tier",), expected) == expected
    refused = api.post("/v1/messages", {**body, "session_id": None})
    assert refused.status_code == 400
    assert "session_over" in refused.json()["error"]["message"]


def test_a_subagent_is_over_once_its_parent_has_the_answer(api) -> None:
    before = ended(api)
    main, sub = question("Where are uploads handled?"), question("Find the handler.")
    chosen = {"structured_outputs": {"choice": [FOUND]}}
    parent = api.post("/v1/chat/completions", asked("agents", main, max_tokens=1))
    assert parent.status_code == 200, parent.text
    child = api.post("/v1/chat/completions", asked("agents", sub, **chosen))
    assert child.status_code == 200, child.text
    assert child.json()["choices"][0]["message"]["content"] == FOUND
    assert child.json()["choices"][0]["finish_reason"] == "stop"
    call = {"id": "1", "type": "function", "function": {"name": "Task", "arguments": "{}"}}
    results = (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": f"{FOUND}\nagent: 1"},
    )
    answer = api.post("/v1/chat/completions", asked("agents", main, *results, max_tokens=1))
    assert answer.status_code == 200, answer.text
    wanted = child.json()["usage"]["prompt_tokens"] // 128
    expected = before + Counter({("device",): wanted, ("cpu",): wanted})
    assert api.await_metrics(ENDED_ENTRIES.shown, ("tier",), expected) == expected
