"""What `cachescope simulate` tells the policy of answers' ends: what a server would have told."""

import json

import pytest

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.simulate.answer_endings import EndingsFrom
from vllm_cachescope.cli.simulate.traced_calls import traced
from vllm_cachescope.cli.traffic import read_traffic
from vllm_cachescope.simulation.policies import make_cache
from vllm_cachescope.simulation.replay import replay
from vllm_cachescope.simulation.traced_request import TracedRequest

ASK = {"model": "m", "messages": [{"role": "user", "content": "one two three " * 20}]}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESPONSES_CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


def chat_stream(reason: str) -> str:
    chunks = [{"choices": [{"delta": {"content": 'said "finish_reason": "stop"'}}]}]
    chunks += [{"choices": [{"delta": {}, "finish_reason": reason}]}]
    return (
        "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\r\n\r\n"
    )


def ends(tmp_path, records, endings=EndingsFrom.ALL) -> list[Ended | None]:
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [one.signals.ended for one in traced(read_traffic(path), 16, None, endings)]


@pytest.mark.parametrize(
    ("beside", "ended"),
    [
        ({"response": {"choices": [{"finish_reason": "tool_calls"}]}}, Ended.TOOLS),
        ({"response": {"choices": [{"finish_reason": "stop"}]}}, Ended.ANSWER),
        ({"response": {"choices": [{"finish_reason": "length"}]}}, None),
        ({"response": {"body": json.dumps({"stop_reason": "end_turn"})}}, Ended.ANSWER),
        ({"response": {"stopReason": "tool_use"}}, Ended.TOOLS),
        ({"response": chat_stream("tool_calls")}, Ended.TOOLS),
        ({"response": chat_stream("length")}, None),
        (
            {"response": {"object": "response", "status": "completed", "output": [RESPONSES_CALL]}},
            Ended.TOOLS,
        ),
        ({"response": {"object": "response", "status": "completed", "output": []}}, Ended.ANSWER),
        ({"response": {"object": "response", "status": "incomplete", "output": []}}, None),
        ({"finish_reason": "stop"}, Ended.ANSWER),
        ({"response": None}, None),
    ],
)
def test_a_recorded_answer_says_how_it_ended(tmp_path, beside, ended) -> None:
    other = {"body": ASK, "response": {"choices": [{"finish_reason": "stop"}]}}
    assert ends(tmp_path, [{"body": ASK, **beside}, other]) == [ended, Ended.ANSWER]
    assert ends(tmp_path, [{"body": ASK, **beside}], EndingsFrom.NONE) == [None]


def messages(*tail: dict[str, object]) -> dict[str, object]:
    return {**ASK, "messages": [*ASK["messages"], *tail]}


CALL = {"role": "assistant", "content": "wait", "tool_calls": [TOOL_CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}
SAID = ({"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"})
USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
GIVEN = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}]}


@pytest.mark.parametrize(
    ("calls", "ended"),
    [
        ([ASK, messages(CALL, RESULT)], Ended.TOOLS),
        ([ASK, messages(*SAID)], Ended.ANSWER),
        (
            [
                {**ASK, "max_tokens": 5, "system": "s"},
                {**messages(USED, GIVEN), "max_tokens": 5, "system": "s"},
            ],
            Ended.TOOLS,
        ),
        (
            [
                {"model": "m", "input": ASK["messages"]},
                {
                    "model": "m",
                    "input": [
                        *ASK["messages"],
                        RESPONSES_CALL,
                        {"type": "function_call_output", "call_id": "1", "output": "r"},
                    ],
                },
            ],
            Ended.TOOLS,
        ),
    ],
)
def test_where_no_answer_is_recorded_the_next_request_shows_it(tmp_path, calls, ended) -> None:
    # What nothing goes on from counts as told, too: otherwise it could be told from the others.
    assert ends(tmp_path, calls) == [ended, Ended.ANSWER]
    assert ends(tmp_path, calls, EndingsFrom.RECORDED) == [None, None]


def test_requests_that_none_goes_on_from_tell_nothing(tmp_path) -> None:
    assert ends(tmp_path, [ASK, ASK, {**ASK, "model": "n"}]) == [None] * 3


def test_recorded_answers_rule_out_what_others_show(tmp_path) -> None:
    cut = {"body": ASK, "response": {"choices": [{"finish_reason": "length"}]}}
    after = {
        "body": messages(*SAID),
        "response": {"choices": [{"finish_reason": "stop"}]},
    }
    assert ends(tmp_path, [cut, after]) == [None, Ended.ANSWER]


def test_the_blocks_of_a_session_that_is_over_go_first() -> None:
    def request(at: float, name: str, over: bool = False) -> TracedRequest:
        keys = (b"head", *(b"%s/%d" % (name.encode(), i) for i in range(4)))
        return TracedRequest(at, keys, 80, session=name, session_over=over)

    def read(over: bool) -> int:
        # At 3 something must go for `c`: by age it would be blocks of `a`.
        requests = [request(0, "a"), request(1, "b", over), request(3, "c"), request(4, "a")]
        return replay(requests, make_cache("learned", 9, requests, 0.2), 16).total.hit_blocks

    assert read(over=False) == 3  # `head` each time.
    assert read(over=True) == 3 + 4


@pytest.mark.parametrize("said", [{"session_over": True}, {}])
def test_a_session_says_that_it_is_over_in_its_body_or_in_a_header(tmp_path, said) -> None:
    headers = {} if said else {"X-CacheScope-Session-Over": "true"}
    path = tmp_path / "calls.jsonl"
    lines = [{"body": {**ASK, **said}, "headers": headers, "session_id": "s"}, {"body": ASK}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = traced(read_traffic(path), 16, None)
    assert (first.session, first.session_over, second.session_over) == ("s", True, False)


def test_the_command_takes_what_tells_of_endings(tmp_path, capsys) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(ASK) + "\n" + json.dumps(messages(CALL, RESULT)) + "\n")
    command = ["simulate", str(path), "--policy", "learned", "--capacity", "9", "--json"]
    for endings in EndingsFrom:
        assert main([*command, "--endings", endings]) == 0
        assert json.loads(capsys.readouterr().out)[0]["requests"] == 2
    with pytest.raises(SystemExit):
        main([*command, "--endings", "some"])
