"""Whatever a client sends, a reader returns a request or raises `BadRequest`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.wire_bodies import EPHEMERAL, TTLS, broken_bodies, hostile_bodies
from tests.examples import examples
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.wire import READERS, strip
from vllm_cachescope.wire.billing_header import is_dropped
from vllm_cachescope.wire.errors import error_body
from vllm_cachescope.wire.truncate import truncate

protocols = st.sampled_from(list(Protocol))


def survive(protocol: Protocol, body: dict[str, Any]) -> None:
    """Run everything that sees a client's body, and check what must hold of any result."""
    try:
        request = READERS[protocol](body, TTLS)
    except BadRequest as refused:
        message = json.dumps(error_body(protocol, refused), ensure_ascii=False).encode()
        assert len(message) < 2000
        return
    assert [part.region for part in request.parts] == sorted(part.region for part in request.parts)
    paths = [part.path for part in request.parts]
    assert len(set(paths)) == len(paths)
    assert sum(part.mark is not None for part in request.parts) <= 4
    for text in (request.session, request.previous_id):
        assert text is None or text.encode()
    for part in request.parts:
        is_dropped(part)
        truncate(body, protocol, part)
    strip(body)


@settings(max_examples=examples(500), deadline=None)
@given(protocols, hostile_bodies)
def test_random_json(protocol: Protocol, body: dict[str, Any]) -> None:
    survive(protocol, body)


@settings(max_examples=examples(1500), deadline=None)
@given(broken_bodies())
def test_one_broken_value(case: tuple[Protocol, dict[str, Any]]) -> None:
    survive(*case)


def nested(depth: int, key: str) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"type": "tool_result", key: [value], "source": {"content": value}}
    return value


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("key", ["content", "output", "more"])
def test_deep_nesting(protocol: Protocol, key: str) -> None:
    """Deeper than Python's own recursion limit, as a parser in C could hand it on."""
    deep = nested(3 * sys.getrecursionlimit(), key)
    item = {"role": "user", "content": [deep]}
    blocks: dict[str, Any] = {"tools": [deep], "system": [deep], "messages": [item]}
    blocks |= {"input": [item], "prompt": deep, "metadata": {"user_id": deep}}
    assert READERS[protocol](blocks, TTLS).parts
    survive(protocol, blocks)
    for name in ("cache_control", "prompt_cache_options", "diagnostics", "prompt_cache_key"):
        survive(protocol, {name: deep})
    survive(protocol, {"tools": [{"cache_control": {"type": deep}}]})


def calls(run: Callable[[], object]) -> int:
    """How many functions ``run`` calls: work that does not depend on the machine."""
    count = 0

    def counter(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counter)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def _chain(protocol: Protocol, size: int) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "text", "text": "x"}
    point = {**block, "prompt_cache_breakpoint": {"mode": "explicit"}}
    result: dict[str, Any] = {"type": "tool_result", "content": [block] * 3}
    many: list[Any] = [{"role": "system", "content": "s"}] * size
    many += [{"role": "user", "content": [result, point] * 2}] * size
    return {
        "tools": [{"name": "a"}] * size,
        "system": [block] * size,
        "messages": many,
        "input": many,
        "prompt": ["x"] * size,
        "cache_control": EPHEMERAL if protocol is Protocol.MESSAGES else None,
    }


@pytest.mark.parametrize("protocol", Protocol)
def test_work_grows_with_the_size_of_the_body(protocol: Protocol) -> None:
    def work(size: int) -> int:
        body = _chain(protocol, size)
        last: PromptRequest = READERS[protocol](body, TTLS)
        return calls(lambda: READERS[protocol](body, TTLS)) + calls(
            lambda: truncate(body, protocol, last.parts[-1])
        )

    assert work(400) <= 4.2 * work(100)


def test_many_marks_are_refused_at_once() -> None:
    block = {"type": "text", "text": "x", "cache_control": EPHEMERAL}
    body = {"messages": [{"role": "user", "content": [block] * 50_000}]}
    with pytest.raises(BadRequest) as refused:
        READERS[Protocol.MESSAGES](body, TTLS)
    assert refused.value.path == "messages[0].content[4].cache_control"
