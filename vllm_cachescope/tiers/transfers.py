"""Jobs that move blocks between the engine's memory and a store, on threads."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.jobs import Finished, LoadJob, StoreJob
from vllm_cachescope.tiers.joining import join
from vllm_cachescope.tiers.store import Store, StoreFailed, StoreUnfit

Job = TypeVar("Job", LoadJob, StoreJob)


class Transfers(ABC, Generic[Job]):
    """A queue of jobs in one direction, and the threads that work it off in batches.

    The public methods are called on the scheduler's thread and do not wait for the store, but for
    `wait_idle` and `join`.

    Whoever writes to a slot reports on it: a key's outcome is reported by the thread that took its
    batch, once it does not touch the slot any more, or, for keys that no thread has taken, by
    whoever drops them under the lock. So nothing is written to a slot, or read from it, after its
    job was reported as finished.

    The lock guards the queue, the jobs' fields, and all numbers here. Whoever holds it may take
    the locks of `BlockStates` and `KeyCounts`, and no other; `Availability` is told of failures
    without it.

    Args:
        tier: the tier's context.
        roles: a name for each thread.
        batch_bytes: bytes that a thread takes on at once; at least one block.
    """

    def __init__(self, tier: TierContext, roles: Sequence[str], batch_bytes: int) -> None:
        self._tier = tier
        self._batch_keys = max(1, batch_bytes // tier.slot_bytes)
        self._finished: SimpleQueue[Finished] = SimpleQueue()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._jobs: deque[Job] = deque()
        self._batches = self._begun = 0
        self._nbytes = 0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"cachescope-{tier.name}-{role}", daemon=True)
            for role in roles
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes queued or under way."""
        return self._nbytes

    def take_finished(self) -> list[Finished]:
        """Return the jobs that are over since the last time."""
        with self._lock:
            self._drop_overdue()
        finished: list[Finished] = []
        while True:
            try:
                finished.append(self._finished.get_nowait())
            except Empty:
                return finished

    @property
    def busy(self) -> bool:
        """Whether a thread uses slots now."""
        return self._batches > 0

    def drop_queued(self) -> None:
        """Drop what no thread has taken."""
        with self._lock:
            self._drop_queued()

    def wait_idle(self) -> None:
        """Wait until the threads are done with what they have taken: each part of that has a
        deadline. The caller submits nothing meanwhile."""
        with self._lock:
            self._idle.wait_for(lambda: self._batches == 0)

    def wake(self) -> None:
        """Have the threads connect: the store has become usable. Called on any thread."""
        with self._lock:
            self._work.notify_all()

    def stop(self) -> None:
        """Drop what no thread has taken, and have the threads end; `join` waits for that."""
        with self._lock:
            self._stopping = True
            self._drop_queued()
            self._work.notify_all()

    def join(self, deadline: float) -> None:
        """Wait until the threads have ended, or for the deadline on the tier's clock."""
        join(self._threads, deadline, self._tier.clock)

    # Methods of each direction. All but `_move` need the lock.

    @abstractmethod
    def _move(self, store: Store, job: Job, first: int, last: int) -> None:
        """Load or store the keys of a batch, and settle them. Called without the lock, on the
        thread that took the batch."""

    @abstractmethod
    def _drop_untaken(self, job: Job, outcome: str) -> None:
        """Take a job out of the queue, and settle what no thread has taken with this outcome."""

    @abstractmethod
    def _drop_overdue(self) -> None:
        """Drop what no thread has taken and should not wait any longer."""

    @abstractmethod
    def _result(self, job: Job) -> Finished:
        """Return the result of a job that is over."""

    def _drop_queued(self) -> None:
        """Drop what no thread has taken. Needs the lock."""
        for job in list(self._jobs):
            self._drop_untaken(job, "dropped")

    def _settle(self, job: Job, keys: int) -> None:
        """The outcome of ``keys`` more keys of a job is known, and their slots are not touched any
        more. Needs the lock."""
        self._nbytes -= keys * self._tier.slot_bytes
        job.open -= keys
        if job.open == 0:
            self._finished.put(self._result(job))

    # The threads.

    def _run(self) -> None:
        store = self._tier.new_store()
        while self._wait_for_work(store):
            self._work_once(store)
        store.close()

    def _wait_for_work(self, store: Store) -> bool:
        """Wait until there is something to do and a connection to do it with.

        Connecting may hang where no deadline reaches, as in a name server. Therefore a thread
        takes on nothing before it has a connection.

        Returns:
            False if the thread is to end.
        """
        availability = self._tier.availability
        while not self._stopping:
            if not store.alive():
                with self._lock:
                    self._work.wait_for(lambda: self._stopping or availability.usable)
                if not self._stopping:
                    try:
                        store.connect(self._tier.timeout_at())
                    except StoreFailed as error:
                        availability.failed(str(error))
                    except StoreUnfit as error:
                        availability.unfit(error)
                continue
            with self._lock:
                self._work.wait_for(lambda: self._stopping or self._jobs)
            # Servers close connections that idle.
            if store.alive():
                return not self._stopping
        return False

    def _work_once(self, store: Store) -> None:
        with self._lock:
            if not self._jobs:
                return
            job = self._jobs[0]
            first, last = job.taken, min(len(job), job.taken + self._batch_keys)
            job.taken = last
            if last == len(job):
                self._jobs.popleft()
            self._batches += 1
            self._begun += 1
        try:
            self._move(store, job, first, last)
        finally:
            with self._lock:
                self._batches -= 1
                self._idle.notify_all()
