"""`make clients` finds what is wrong with a client's session, and nothing where all is well."""

import json
from collections import Counter
from typing import Any

import pytest

from clients.desk import TEXT
from clients.findings import find
from clients.recorder import Exchange
from demo.client import Metrics

COUNTED = Metrics(Counter({("read_device", "org", "5m"): 60, ("created", "org", "5m"): 240}))


def exchange(status: int = 200, session: str = "s", read: int = 20, **body: Any) -> Exchange:
    usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": read}}
    reply = "".join(
        f"data: {json.dumps(event)}\n\n" for event in ({"choices": []}, {"usage": usage})
    )
    message = {"role": "user", "content": TEXT, "cache_control": {"type": "ephemeral"}}
    asked = {"messages": [message], "prompt_cache_key": session, **body}
    return Exchange("/v1/chat/completions", {}, asked, status, bytearray(reply.encode()))


def test_a_session_as_it_should_be() -> None:
    found = find([exchange() for _ in range(3)], COUNTED, 0, [{"expected": True}])
    assert found.faults == ()
    assert (found.requests, found.prompt_tokens, found.read) == (3, 300, 60)
    assert found.session == "prompt_cache_key"
    assert found.marks == {"messages[].cache_control": 3}
    assert found.resumed == {"prompt": 100, "read": 20}


GOOD = exchange()
BREAK = {"expected": False, "cause": "tools_changed", "where": {}}


@pytest.mark.parametrize(
    ("exchanges", "unexplained", "breaks", "fault"),
    [
        ([GOOD, GOOD, exchange(status=400)], 0, [], "/v1/chat/completions 400"),
        ([GOOD, GOOD, exchange(session="t")], 0, [], "2 sessions"),
        ([GOOD, GOOD, exchange(read=21)], 0, [], "usage"),
        ([GOOD] * 3, 128, [], "128 tokens lost"),
        ([GOOD] * 3, 0, [BREAK], "tools_changed"),
        ([exchange(messages=[])] * 3, 0, [], "no tool call"),
    ],
)
def test_what_should_not_be_is_a_fault(
    exchanges: list[Exchange], unexplained: int, breaks: list[Any], fault: str
) -> None:
    (found,) = find(exchanges, COUNTED, unexplained, breaks).faults
    assert found.startswith(fault)
