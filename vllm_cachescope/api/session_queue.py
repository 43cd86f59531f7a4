"""A queue for each session: what is put off is done in the order of its requests."""

import asyncio
from collections.abc import Callable, Coroutine

from vllm_cachescope.tenancy.scope import Caller


class SessionQueue:
    """Work on requests that was put off, for the event loop.

    Args:
        on_change: called with 1 when work is put off, and with -1 when it is done.
    """

    def __init__(self, on_change: Callable[[int], object] = lambda change: None) -> None:
        self._on_change = on_change
        self._last: dict[Caller, asyncio.Task[None]] = {}

    def is_empty(self, caller: Caller) -> bool:
        """Tell whether all work on the requests of ``caller`` is done."""
        return caller not in self._last

    async def done(self, caller: Caller, timeout_s: float | None = None) -> None:
        """Wait until the work that was put off for ``caller`` so far is done, or for ``timeout_s``
        seconds."""
        if (last := self._last.get(caller)) is not None:
            await asyncio.wait([last], timeout=timeout_s)

    def put_off(
        self,
        caller: Caller,
        work: Coroutine[None, None, None],
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Have ``work`` done once all that was put off for ``caller`` before is done; then call
        ``then``, whatever came of it."""
        task = asyncio.get_running_loop().create_task(self._after(self._last.get(caller), work))
        self._last[caller] = task
        self._on_change(1)
        task.add_done_callback(lambda _: self._forget(caller, task))
        task.add_done_callback(lambda _: then())

    @staticmethod
    async def _after(before: asyncio.Task[None] | None, work: Coroutine[None, None, None]) -> None:
        if before is not None:
            await asyncio.wait([before])
        await work

    def _forget(self, caller: Caller, task: asyncio.Task[None]) -> None:
        self._on_change(-1)
        if self._last.get(caller) is task:
            del self._last[caller]
