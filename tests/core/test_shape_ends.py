"""Conversations whose end shows in the shape of a session's requests, or is said by the client."""

import copy
import random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.core.agent_session import READERS, words
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.diagnosis.answer_lines import (
    MAX_READ_CHARACTERS,
    TAIL_CHARACTERS,
    answer_lines,
    carried_lines,
)
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire.session_end import header_says_over

SECRET = b"a secret of the tests"
FOUND = "The handler of uploads is in src/upload.py.\nIt has 40 lines, and no test of its own."


class Server:
    """The API side of a server, whose engines compute every prompt."""

    def __init__(self) -> None:
        self.over: list[str] = []
        self._diagnoser = Diagnoser(
            SECRET, 16, registry=CollectorRegistry(), tell_over=self.over.extend
        )
        self._asked = 0

    def ask(self, body: dict[str, Any], answer: str = "", session: str | None = "s") -> str:
        """Send a request; return the nonce of its prompt. ``answer`` is what it ends with, if its
        turn is over then."""
        self._asked += 1
        nonce = f"nonce {self._asked}"
        request = READERS[Protocol.MESSAGES](body, (300, 3600))
        reports: dict[str, Report] = {}
        pending = self._diagnoser.open(Caller("acme", session), request, body, {}, reports)
        reports[nonce] = Report((Row("created", Scope.ORG, 300, 64),), engine=EngineId(0, "e"))
        self._diagnoser.close(pending, reports.values(), None, answer=answer)
        return nonce


def conversation(system: str, question: str) -> dict[str, Any]:
    chance = random.Random(question)
    text = f"{question} {words(chance, 2000)}"
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "max_tokens": 9, "system": system, "messages": messages}


def call(body: dict[str, Any], *results: str) -> dict[str, Any]:
    """Return the conversation after an answer that called tools, with what they returned."""
    ids = [f"toolu_{len(body['messages'])}_{i}" for i in range(len(results))]
    calls = [{"type": "tool_use", "id": i, "name": "Task", "input": {"for": i}} for i in ids]
    returned = [
        {
            "type": "tool_result",
            "tool_use_id": i,
            "content": [{"type": "text", "text": result}, {"type": "text", "text": f"agent: {i}"}],
        }
        for i, result in zip(ids, results, strict=True)
    ]
    return {
        **copy.deepcopy(body),
        "messages": [
            *copy.deepcopy(body["messages"]),
            {"role": "assistant", "content": calls},
            {"role": "user", "content": returned},
        ],
    }


def agent(server: Server, question: str, answer: str, session: str | None = "s") -> str:
    """Run a subagent of two requests; return the nonce of the last one."""
    body = conversation("You are a subagent.", question)
    server.ask(body, session=session)
    return server.ask(call(body, words(random.Random(question), 400)), answer, session)


def test_a_subagent_is_over_once_its_parent_carries_the_answer() -> None:
    server, main = Server(), conversation("You are the main agent.", "Where are uploads handled?")
    server.ask(main)
    last = agent(server, "Find the handler", FOUND)
    other = agent(server, "Find its tests", "There is no test of the upload's handler.")
    # The parent goes on with something else: nothing is known of them yet.
    main = call(main, "Command finished with code 0 and no output.")
    server.ask(main)
    assert server.over == []
    main = call(main, FOUND)
    server.ask(main)
    assert server.over == [last]
    # Told once; and the others when their turn has come, here as JSON.
    main = call(main, '{"result": "Done.\\nThere is no test of the upload\'s handler.\\n"}')
    server.ask(main)
    assert server.over == [last, other]


def test_nobody_elses_answer_ends_a_conversation() -> None:
    server, main = Server(), conversation("You are the main agent.", "Where are uploads handled?")
    server.ask(main)
    agent(server, "Find the handler", FOUND, session="another")
    agent(server, "Find the handler", FOUND, session=None)
    server.ask(call(main, FOUND))
    assert server.over == []
    # Nor does a conversation's own answer, nor one that says next to nothing.
    agent(server, "Is there one?", "Yes.")
    server.ask(call(call(main, FOUND), "Yes."), FOUND)
    server.ask(call(call(call(main, FOUND), "Yes."), FOUND))
    assert server.over == []


def test_a_subagent_that_is_asked_on_is_not_over() -> None:
    server, main = Server(), conversation("You are the main agent.", "Where are uploads handled?")
    server.ask(main)
    body = conversation("You are a subagent.", "Find the handler")
    server.ask(body, FOUND)
    server.ask(call(body, "more of it was asked for"))
    server.ask(call(main, FOUND))
    assert server.over == []


def test_what_a_compaction_replaced_is_over() -> None:
    server, body = Server(), conversation("You are the main agent.", "Where are uploads handled?")
    nonces = []
    for turn in range(6):
        nonces.append(server.ask(body))
        body = call(body, words(random.Random(turn), 2000))
    nonces.append(server.ask(body))
    assert server.over == []
    summary = "This session is continued from a previous conversation. " + words(
        random.Random("summary"), 1500
    )
    server.ask({**body, "messages": [{"role": "user", "content": summary}]})
    assert server.over == [nonces[-1]]


def test_lines_are_told_from_others_within_bounds() -> None:
    def carries(content: Any, role: str = "user") -> frozenset[bytes]:
        part = Part(Region.MESSAGES, "messages[0].content[0]", content, role)
        return carried_lines((part,), SECRET)

    lines = answer_lines("yes\n" + FOUND, SECRET)
    assert len(lines) == 2
    assert carries(FOUND) == {*lines}
    assert carries({"type": "tool_result", "content": f"> \n{FOUND}\nagent: 1"}) >= {*lines}
    assert not carries(FOUND, "assistant") and not carries({"type": "function_call", "x": FOUND})
    assert answer_lines(FOUND, b"another secret of tests") != lines
    assert answer_lines("yes", SECRET) == answer_lines("", SECRET) == ()
    # What is cut off in front is no line; what is too long is not read to its end.
    long = "x" * TAIL_CHARACTERS + FOUND
    assert answer_lines(long, SECRET) == lines[-1:]
    assert carries("x" * MAX_READ_CHARACTERS + "\n" + FOUND) & {*lines} == frozenset()
    deep: Any = FOUND
    for _ in range(10_000):
        deep = [deep]
    assert carries(deep) == frozenset()
    assert carries("\ud800 half of a surrogate pair")


@pytest.mark.parametrize("protocol", READERS)
def test_a_session_can_be_said_to_be_over_in_each_format(protocol: Protocol) -> None:
    field = {
        Protocol.COMPLETIONS: {"prompt": "Hello"},
        Protocol.RESPONSES: {"input": "Hello"},
    }.get(protocol, {"messages": [{"role": "user", "content": "Hello"}]})
    body = {"model": "m", "max_tokens": 1, **field}
    read = READERS[protocol]
    assert not read(body, (300,)).session_over
    assert not read({**body, "session_over": None}, (300,)).session_over
    assert read({**body, "session_over": True}, (300,)).session_over
    for wrong in ("true", 1, []):
        with pytest.raises(BadRequest, match=r"session_over.*true, false") as refused:
            read({**body, "session_over": wrong}, (300,), strict=True)
        assert refused.value.path == "session_over"
        lenient = read({**body, "session_over": wrong}, (300,), strict=False)
        assert not lenient.session_over
        assert [(m.path, m.reason) for m in lenient.ignored] == [
            ("session_over", IgnoredReason.OPTION)
        ]


def test_a_header_says_the_same_and_is_checked() -> None:
    assert not header_says_over({})
    assert header_says_over({"x-cachescope-session-over": "true"})
    with pytest.raises(BadRequest, match="x-cachescope-session-over"):
        header_says_over({"x-cachescope-session-over": "yes"})
