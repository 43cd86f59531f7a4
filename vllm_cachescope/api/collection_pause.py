"""A pause of Python's garbage collection while the server reads a large body.

A body of a hundred thousand parts becomes several hundred thousand objects, none of them garbage. A
full collection stops every thread, and those that answer other clients among them, to look at all
of these; the server that reads such a body starts six, which are two fifths of its time.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIMIT_S = 3.0
"""How long a pause lasts at most, in seconds: longer than a server takes to read a body."""


def _call_later(delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(delay_s, call)


class CollectionPause:
    """Pauses collection for whoever holds it, and for no more than half of the time: a client that
    sends large bodies without end does not make the process keep what is garbage.

    Args:
        clock: returns the time, in seconds.
        call_later: has a function called after so many seconds, unless the handle that it returns
            is cancelled.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] = _call_later,
    ) -> None:
        self._clock, self._call_later = clock, call_later
        self._holders = 0
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._not_before = float("-inf")

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Pause collection inside, until the function that this yields is called."""
        is_held = True
        self._holders += 1
        if self._holders == 1:
            self._begin()

        def let_go() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._holders -= 1
                if not self._holders:
                    self._end()

        try:
            yield let_go
        finally:
            let_go()

    def _begin(self) -> None:
        # Whoever else has switched collection off will switch it on.
        if gc.isenabled() and self._clock() >= self._not_before:
            gc.disable()
            self._began = self._clock()
            self._timer = self._call_later(LIMIT_S, self._end)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.enable()
            now = self._clock()
            self._not_before = now + (now - self._began)
