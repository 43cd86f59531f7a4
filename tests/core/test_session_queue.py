"""SessionQueue: what is put off is done in order, session by session."""

import asyncio

from vllm_cachescope.api.session_queue import SessionQueue
from vllm_cachescope.tenancy.scope import Caller

ONE, OTHER = Caller("acme", "one"), Caller("acme", "other")


async def test_the_work_of_a_session_is_done_in_order_and_waits_for_no_other_session() -> None:
    queue, done = SessionQueue(), list[str]()
    gate = asyncio.Event()

    async def work(name: str, waits: bool = False) -> None:
        if waits:
            await gate.wait()
        done.append(name)

    queue.put_off(ONE, work("one 1", waits=True))
    queue.put_off(ONE, work("one 2"))
    queue.put_off(OTHER, work("other"))
    await queue.done(OTHER)
    assert done == ["other"] and queue.is_empty(OTHER) and not queue.is_empty(ONE)
    gate.set()
    await queue.done(ONE)
    assert done == ["other", "one 1", "one 2"] and queue.is_empty(ONE)
    await queue.done(ONE)


async def test_work_that_fails_keeps_no_other_work_waiting() -> None:
    changes: list[int] = []
    queue, done = SessionQueue(changes.append), list[str]()

    async def fail() -> None:
        raise ValueError("of the test")

    async def work() -> None:
        done.append("done")

    caught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))
    queue.put_off(ONE, fail())
    queue.put_off(ONE, work())
    await queue.done(ONE)
    assert done == ["done"] and queue.is_empty(ONE)
    assert changes == [1, 1, -1, -1]
