"""Garbage collection rests while the server reads a large body, and never for long."""

import asyncio
import gc
from collections.abc import Callable, Iterator

import pytest
from starlette.types import Receive, Scope, Send

from tests.core.test_middleware import Connecting, serve
from vllm_cachescope.api.collection_pause import LIMIT_S, CollectionPause
from vllm_cachescope.api.incoming_body import LARGE_BYTES


class Timer:
    """Stands for a loop's timer, and is driven by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[Callable[[], None]] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        assert delay_s == LIMIT_S
        self.due.append(call)
        loop = asyncio.new_event_loop()
        try:
            return asyncio.TimerHandle(0, call, (), loop)
        finally:
            loop.close()


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


@pytest.fixture
def timer() -> Timer:
    return Timer()


@pytest.fixture
def pause(timer: Timer) -> CollectionPause:
    return CollectionPause(lambda: timer.now, timer.call_later)


def test_it_lasts_until_the_last_holder_lets_go(pause: CollectionPause) -> None:
    with pause.held() as first:
        assert not gc.isenabled()
        with pause.held():
            first()
            first()
            assert not gc.isenabled()
        assert gc.isenabled()


def test_a_failure_ends_it(pause: CollectionPause) -> None:
    with pytest.raises(ValueError, match="fails"), pause.held():
        raise ValueError("it fails")
    assert gc.isenabled()


def test_it_is_over_in_time_whoever_holds_it(pause: CollectionPause, timer: Timer) -> None:
    with pause.held():
        timer.now = LIMIT_S
        timer.due.pop()()
        assert gc.isenabled()
        with pause.held():
            assert gc.isenabled() and not timer.due
    assert gc.isenabled()


def test_it_rests_as_long_as_it_lasted(pause: CollectionPause, timer: Timer) -> None:
    with pause.held():
        timer.now = 2.0
    timer.now = 3.9
    with pause.held():
        assert gc.isenabled()
    timer.now = 4.0
    with pause.held():
        assert not gc.isenabled()


def test_what_others_switched_off_stays_off(pause: CollectionPause) -> None:
    gc.disable()
    with pause.held():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize(("size", "rests"), [(LARGE_BYTES, True), (LARGE_BYTES - 1, False)])
async def test_it_lasts_while_the_server_reads_a_large_body(size: int, rests: bool) -> None:
    seen = []

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        seen.append(gc.isenabled())
        await send({"type": "answered"})
        seen.append(gc.isenabled())

    body = b'{"model": "m", "messages": []'.ljust(size - 1) + b"}"
    await serve(Connecting(server), "http", body, path="/v1/messages", method="POST")
    assert seen == [not rests, True]
