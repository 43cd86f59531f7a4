"""The desk of an engine: calls of other threads, answered on the scheduler's between two steps."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

WAITING = 64
"""Calls that may wait to be answered. An engine that computes answers none."""


class Busy(Exception):
    """The engine does not answer now."""


class Desk:
    """Where other threads ask something of the scheduler's.

    Args:
        wake: has an engine that sleeps look here.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def ask(self, call: Callable[[], Any], patience_s: float) -> Any:
        """Have the scheduler's thread make a call, and return what it returned. Whatever it raises
        is raised here.

        Args:
            call: the call.
            patience_s: how long to wait, in seconds.

        Raises:
            Busy: if the engine does not answer so soon, or too many wait already.
        """
        if len(self._waiting) >= WAITING:
            raise Busy
        answer: Future[Any] = Future()
        self._waiting.append((call, answer))
        self._wake()
        try:
            return answer.result(patience_s)
        except TimeoutError:
            # Whoever has given up is not told, and nothing is done for it any more.
            answer.cancel()
            raise Busy from None

    def answer(self) -> None:
        """Make the calls that wait. To be called on the scheduler's thread."""
        while self._waiting:
            call, answer = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)
