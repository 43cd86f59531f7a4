"""What the server gets to read of a request that was read before it."""

from collections.abc import Iterable
from typing import Any

from starlette.types import Message, Receive

from vllm_cachescope.api.http_request import read_body, with_body

GONE = {"type": "http.disconnect"}


def scope(**fields: Any) -> dict[str, Any]:
    return {"type": "http", "headers": [(b"content-length", b"9"), (b"x", b"1")], **fields}


def receiving(messages: Iterable[Message]) -> Receive:
    left = iter(messages)

    async def receive() -> Message:
        return next(left)

    return receive


def piece(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_is_delivered_once_more_and_then_what_comes_after_it() -> None:
    receive = receiving([piece(b"one ", True), piece(b"two", False), GONE])
    body, replayed = await read_body(scope(), receive)
    assert body == b"one two"
    assert [await replayed(), await replayed()] == [piece(b"one two", False), GONE]


async def test_another_body_takes_the_place_of_the_one_that_was_read() -> None:
    receive = receiving([piece(b"original", False), GONE])
    given = scope()
    await read_body(given, receive)
    changed, replayed = with_body(given, receive, b"other")
    assert changed["headers"] == [(b"content-length", b"5"), (b"x", b"1")]
    assert given["headers"][0] == (b"content-length", b"9")
    assert [await replayed(), await replayed()] == [piece(b"other", False), GONE]


async def test_a_client_that_disconnects_in_the_middle_of_a_body() -> None:
    receive = receiving([piece(b"one ", True), GONE])
    body, replayed = await read_body(scope(), receive)
    assert body == b"" and await replayed() == GONE
