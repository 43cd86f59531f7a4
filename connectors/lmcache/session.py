"""A session with an adapter, from its making to its failure: the tasks that it was given.

LMCache's adapters do not say that their server has gone, and not all of them find their way back:
the RESP one answers "no" to everything from then on, and mistakes the end of one answer for the
beginning of the next when it was sent what it did not expect. So nothing is asked of an adapter
that has once failed: its session is retired, and the next one begins with a new adapter.
"""

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import L2AdapterInterface
from lmcache.v1.platform import consume_fd

from vllm_cachescope.connectors.lmcache.memory import Buffer, Staging
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.store import StoreFailed, StoreLate

logger = logger_of(__name__)

_TICK_MS = 500

T = TypeVar("T")


class Call(Generic[T]):
    """A call that may hang, on a thread of its own."""

    def __init__(self, function: Callable[[], T], clock: Callable[[], float]) -> None:
        self._function = function
        self._clock = clock
        self._result: T | None = None
        self._error: Exception | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="cachescope-lmcache-call", daemon=True).start()

    def result(self, deadline: float) -> T:
        """Return what the function returned.

        Raises:
            StoreFailed: if it raised something.
            StoreLate: if it has not returned by the deadline.
        """
        if not self._over.wait(max(0.0, deadline - self._clock())):
            raise StoreLate("the adapter does not come back")
        if self._error is not None:
            raise StoreFailed(str(self._error) or repr(self._error)) from self._error
        return cast(T, self._result)

    def _run(self) -> None:
        try:
            self._result = self._function()
        except Exception as error:
            self._error = error
        self._over.set()


class Task:
    """A task of an adapter: a lookup, a load or a store.

    Attributes:
        keys: the keys of its objects.
        buffers: the memory that it reads or writes; the session's until the task is over.
        since: when the task began, on the tier's clock, in seconds.
        over: set when the task has ended, or is not expected to end any more.
        found: for each key, whether the task succeeded; None if that is not known.
        held: whether the adapter may touch the buffers.
        abandoned: whether nobody waits for it.
    """

    __slots__ = ("abandoned", "buffers", "found", "held", "keys", "over", "since")

    def __init__(self, keys: list[ObjectKey], buffers: Sequence[Buffer], since: float) -> None:
        self.keys = keys
        self.buffers = buffers
        self.since = since
        self.over = threading.Event()
        self.found: list[bool] | None = None
        self.held = self.abandoned = False


class Session:
    """An adapter, with a thread that takes its answers. Safe to use from several threads.

    Args:
        adapter: a new one; it is closed with the session.
        canary: the key of an object that the store holds as long as it holds anything of ours.
        staging: the memory of the tasks' buffers.
        stuck_s: how long a task may take before the adapter counts as stuck, in seconds.
        clock: the tier's clock.

    Attributes:
        adapter: the adapter.
        canary: see above.
        spoiled: whether an object did not load that was there.
    """

    def __init__(
        self,
        adapter: L2AdapterInterface,
        canary: ObjectKey,
        staging: Staging,
        stuck_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.adapter = adapter
        self.canary = canary
        self.spoiled = False
        self._staging = staging
        self._stuck_s = stuck_s
        self._clock = clock
        self._lock = threading.Lock()
        self._lookups: dict[int, Task] = {}
        self._loads: dict[int, Task] = {}
        self._stores: dict[int, Task] = {}
        self._closing: Call[None] | None = None
        self._reason = ""
        self._wake_read, self._wake_write = os.pipe()
        self._pump = threading.Thread(
            target=self._run, name="cachescope-lmcache-answers", daemon=True
        )
        self._pump.start()

    @property
    def alive(self) -> bool:
        """Whether something may be asked of it."""
        return self._closing is None

    def retire(self, reason: str) -> Call[None]:
        """Ask nothing of the adapter any more, and close it. Whoever waits gets `StoreFailed` with
        ``reason``. Returns the closing, which may hang."""
        with self._lock:
            if self._closing is None:
                self._reason = reason
                for task in self._tasks():
                    task.over.set()
                self._closing = Call(self._close, self._clock)
            return self._closing

    def lookup(self, keys: list[ObjectKey], deadline: float) -> list[bool]:
        """Return which objects there are.

        Raises:
            StoreFailed: if it cannot be told.
        """
        task = Task(keys, (), self._clock())
        self._submit(self._lookups, task)
        return self.wait(task, deadline)

    def find(self, keys: Sequence[ObjectKey], deadline: float) -> list[bool]:
        """Return which objects there are, once it is known that the adapter tells the truth: it
        answers "no" to everything when its server has gone or was emptied, and does not find the
        canary then.

        Raises:
            StoreFailed: if it cannot be told, or the canary is not found. The session is over then.
        """
        canary, *found = self.lookup([self.canary, *keys], deadline)
        if not canary:
            reason = "it does not find what it held: it has gone, or was emptied"
            self.retire(reason)
            raise StoreFailed(reason)
        return found

    def check_alive(self, deadline: float) -> None:
        """Tell a "no" from a failure, after something did not load or was not stored.

        Raises:
            StoreFailed: if the adapter has failed.
        """
        self.find([], deadline)

    @contextmanager
    def loading(self, keys: Sequence[ObjectKey], buffers: Sequence[Buffer]) -> Iterator[list[Task]]:
        """Begin to load an object into each buffer, each as a task of its own, so that the adapter
        works on them side by side. The buffers are the session's from here on; what they hold may
        be read inside this context, once `wait` has returned.

        Raises:
            StoreFailed: if the adapter has failed.
        """
        with self._transferring(self._loads, keys, buffers) as tasks:
            yield tasks

    @contextmanager
    def storing(self, keys: Sequence[ObjectKey], buffers: Sequence[Buffer]) -> Iterator[list[Task]]:
        """Begin to store what each buffer holds; see `loading`."""
        with self._transferring(self._stores, keys, buffers) as tasks:
            yield tasks

    def wait(self, task: Task, deadline: float) -> list[bool]:
        """Return which keys a task succeeded with.

        Raises:
            StoreFailed: if that is not known by the deadline.
        """
        if not task.over.wait(max(0.0, deadline - self._clock())):
            raise StoreLate("no answer in time")
        if task.found is None:
            raise StoreFailed(self._reason)
        return task.found

    def drop(self, keys: list[ObjectKey], deadline: float) -> None:
        """Delete objects, as far as the adapter does it: it does not tell.

        Raises:
            StoreFailed: if it does not come back.
        """
        if keys:
            Call(lambda: self.adapter.delete(keys), self._clock).result(deadline)

    @contextmanager
    def _transferring(
        self, kind: dict[int, Task], keys: Sequence[ObjectKey], buffers: Sequence[Buffer]
    ) -> Iterator[list[Task]]:
        since = self._clock()
        tasks = [Task([key], [b], since) for key, b in zip(keys, buffers, strict=True)]
        try:
            for task in tasks:
                self._submit(kind, task)
            yield tasks
        finally:
            with self._lock:
                for task in tasks:
                    self._abandon(task)

    def _submit(self, tasks: dict[int, Task], task: Task) -> None:
        # The lock is held until the task is known, or its answer could come before.
        with self._lock:
            if self._closing is not None:
                raise StoreFailed(self._reason)
            objects = [buffer.object for buffer in task.buffers]
            if tasks is self._lookups:
                number = self.adapter.submit_lookup_and_lock_task(task.keys, {})
            elif tasks is self._loads:
                number = self.adapter.submit_load_task(task.keys, objects)
            else:
                number = self.adapter.submit_store_task(task.keys, objects)
            tasks[number] = task
            task.held = True

    def _abandon(self, task: Task) -> None:
        """Nobody waits for the task any more. Needs the lock."""
        task.abandoned = True
        self._free(task)

    def _free(self, task: Task) -> None:
        """Release the buffers if neither side needs them. Needs the lock."""
        if task.abandoned and not task.held:
            for buffer in task.buffers:
                buffer.pool.release(buffer)
            task.buffers = ()

    def _tasks(self) -> list[Task]:
        return [*self._lookups.values(), *self._loads.values(), *self._stores.values()]

    # The thread that takes the answers.

    def _run(self) -> None:
        adapter = self.adapter
        poller = select.poll()
        takers: dict[int, Callable[[], None]] = {
            adapter.get_store_event_fd(): self._take_stores,
            adapter.get_lookup_and_lock_event_fd(): self._take_lookups,
            adapter.get_load_event_fd(): self._take_loads,
        }
        for fd in (*takers, self._wake_read):
            poller.register(fd, select.POLLIN)
        while self._closing is None:
            try:
                for fd, _ in poller.poll(_TICK_MS):
                    if fd in takers:
                        consume_fd(fd)
                        takers[fd]()
                self._look_for_stuck()
            except Exception as error:
                logger.exception("An adapter of LMCache's failed")
                self.retire(f"the adapter failed: {error}")

    def _take_stores(self) -> None:
        with self._lock:
            for number, result in self.adapter.pop_completed_store_tasks().items():
                self._end(self._stores, number, [result.is_successful()])

    def _take_lookups(self) -> None:
        with self._lock:
            found = self._take(self._lookups, self.adapter.query_lookup_and_lock_result)
        if found:
            # We want no locks: what is evicted between a lookup and the load is a miss.
            self.adapter.submit_unlock(found)

    def _take_loads(self) -> None:
        with self._lock:
            self._take(self._loads, self.adapter.query_load_result)

    def _take(self, tasks: dict[int, Task], query: Callable[[int], Any]) -> list[ObjectKey]:
        """End the tasks there are answers to; return the keys they succeeded with. Needs the
        lock."""
        succeeded: list[ObjectKey] = []
        for number, task in list(tasks.items()):
            bits = query(number)
            if bits is not None:
                found = [bits.test(i) for i in range(len(task.keys))]
                succeeded += [key for key, there in zip(task.keys, found, strict=True) if there]
                self._end(tasks, number, found)
        return succeeded

    def _end(self, tasks: dict[int, Task], number: int, found: list[bool]) -> None:
        task = tasks.pop(number, None)
        if task is not None:
            task.found = found
            task.held = False
            task.over.set()
            self._free(task)

    def _look_for_stuck(self) -> None:
        with self._lock:
            since = min((task.since for task in self._tasks()), default=self._clock())
        if self._clock() - since > self._stuck_s:
            self.retire("the adapter is stuck")

    def _close(self) -> None:
        os.write(self._wake_write, b"x")
        self._pump.join()
        with self._lock:
            tasks = self._tasks()
        if tasks:
            self._staging.keep()
        try:
            self.adapter.close()
        finally:
            os.close(self._wake_read)
            os.close(self._wake_write)
            # An adapter that has been closed writes to no buffer; and if one does, the MAC of
            # what is stored or loaded there by then shows it.
            with self._lock:
                for task in tasks:
                    task.held = False
                    self._free(task)
