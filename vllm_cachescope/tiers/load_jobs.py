"""The loads under way, and the threads that read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.block_states import BlockState
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.envelope import BadEnvelope
from vllm_cachescope.tiers.jobs import Finished, LoadJob
from vllm_cachescope.tiers.store import Misfit, Store, StoreFailed, StoreLate
from vllm_cachescope.tiers.transfers import Transfers

logger = logger_of(__name__)

READ_BATCH_BYTES = 8 << 20
"""Bytes that a thread loads at once: so few that a prompt's blocks arrive from the first to the
last although several threads read them, and so many that what each batch costs besides is little.
From LMCache's files, 128 blocks of 1 MiB take 68 ms, and 76 in batches of half the size (fastest
of 24 each, in turn, on two busy cores)."""

_OUTCOMES = {
    BlockState.GONE: "gone",
    BlockState.LATE: "late",
    BlockState.UNREAD: "failed",
}
"""The outcomes of keys that are not loaded, by their state. Damaged ones are counted apart."""


@dataclass(slots=True)
class _Batch:
    """The outcomes of the keys of one batch, from its first key on.

    Attributes:
        loaded: keys that are loaded, each with its TTL in seconds.
        damaged: keys whose values must not be used: damaged or forged.
        failures: all keys that are not loaded, and why.
    """

    loaded: list[tuple[bytes, int]] = field(default_factory=list)
    damaged: list[bytes] = field(default_factory=list)
    failures: dict[bytes, BlockState] = field(default_factory=dict)

    @property
    def reached(self) -> int:
        """How many keys of the batch have an outcome."""
        return len(self.loaded) + len(self.failures)


class LoadJobs(Transfers[LoadJob]):
    """The loads under way; see `Transfers`.

    Every load has a deadline. A load may go on until ``promised_until`` whatever the store does,
    and from there until its ``deadline`` only while the store sends something every
    ``Limits.load_deadline_s``. Blocks that have arrived by then are kept; keys that no thread has
    taken by then are dropped as late.
    """

    def __init__(self, tier: TierContext) -> None:
        roles = [f"read{i}" for i in range(tier.limits.connections)]
        super().__init__(tier, roles, READ_BATCH_BYTES)
        # Requests, with how many of their loads are under way. Under the lock.
        self._requests: Counter[str] = Counter()
        # When the last value arrived, of whatever load. Threads replace it without the lock.
        self._arrived_at = float("-inf")
        # The kinds of unusable values that the log has told of. Under the lock.
        self._told: set[str] = set()

    @property
    def room_bytes(self) -> int:
        """How many more bytes may be loaded at the same time."""
        return self._tier.limits.inflight_bytes - self._nbytes

    def submit(self, job: LoadJob) -> None:
        """Begin a load. The caller has made sure that there is room for it."""
        with self._lock:
            self._nbytes += len(job) * self._tier.slot_bytes
            self._requests[job.request_id] += 1
            self._jobs.append(job)
            self._work.notify_all()

    def is_loading(self, request_id: str) -> bool:
        """Whether a load for the request is under way. If not, all of its loads are among those
        that `take_finished` returns or has returned."""
        with self._lock:
            self._drop_overdue()
            return request_id in self._requests

    def _drop_overdue(self) -> None:
        now = self._tier.clock()
        if not self._tier.availability.usable:
            self._drop_queued()
            return
        for job in [job for job in self._jobs if self._latest(job) <= now]:
            self._drop_untaken(job, "late")

    def _drop_untaken(self, job: LoadJob, outcome: str) -> None:
        self._jobs.remove(job)
        untaken = job.keys[job.taken :]
        job.taken = len(job)
        self._tier.counts.add("load", outcome, len(untaken))
        state = BlockState.LATE if outcome == "late" else BlockState.UNREAD
        job.fail(dict.fromkeys(untaken, state))
        self._settle(job, len(untaken))

    def _settle(self, job: LoadJob, keys: int) -> None:
        if job.open == keys:
            self._requests -= Counter((job.request_id,))
        super()._settle(job, keys)

    def _result(self, job: LoadJob) -> Finished:
        return Finished(
            job.job_id,
            len(job.loaded) == len(job.keys),
            tuple(job.loaded),
            job.request_id,
            len(job.loaded) * self._tier.slot_bytes,
            self._tier.clock() - job.started,
        )

    def _latest(self, job: LoadJob) -> float:
        """Return until when a load may go on if nothing arrives from here on."""
        patience = self._arrived_at + self._tier.limits.load_deadline_s
        return min(job.deadline, max(job.promised_until, patience))

    # The threads that read.

    def _move(self, store: Store, job: LoadJob, first: int, last: int) -> None:
        keys, slots = job.keys[first:last], job.slots[first:last]
        batch = _Batch()
        had_s = self._latest(job) - self._tier.clock()
        try:
            with self._tier.times.measure("load"):
                self._read(store, job, keys, slots, batch)
        except StoreFailed as error:
            late = isinstance(error, StoreLate)
            unread = keys[batch.reached :]
            nothing_came = len(unread) == len(keys)
            state = BlockState.LATE if late else BlockState.UNREAD
            batch.failures |= dict.fromkeys(unread, state)
            with self._lock:
                if job in self._jobs:
                    # What comes after a gap is of no use.
                    self._drop_untaken(job, _OUTCOMES[state])
            if not late:
                self._tier.availability.failed(str(error))
            # A store that had little time, or used it, is slow and not dead.
            had_time = had_s >= self._tier.limits.load_deadline_s / 2
            if nothing_came and (had_time or not late):
                self._tier.availability.read_failed(str(error))
        except Exception:
            # A mistake of ours must not keep a request waiting.
            logger.exception("Tier %s: a load failed", self._tier.name)
            store.close()
            batch.failures |= dict.fromkeys(keys[batch.reached :], BlockState.UNREAD)
        self._note(batch)
        with self._lock:
            job.loaded += batch.loaded
            job.fail(batch.failures)
            self._settle(job, len(keys))

    def _read(
        self,
        store: Store,
        job: LoadJob,
        keys: Sequence[bytes],
        slots: Sequence[memoryview],
        batch: _Batch,
    ) -> None:
        """Read keys into their slots, and put into ``batch`` what came of it, key by key.

        Raises:
            StoreFailed: if the store stops answering; the rest of the slots is not touched again.
        """
        with self._tier.envelopes.landing(slots) as payloads:
            heads = store.read(keys, payloads, lambda: self._latest(job))
            for key, slot, payload, head in zip(keys, slots, payloads, heads, strict=True):
                self._arrived_at = self._tier.clock()
                if head is None:
                    batch.failures[key] = BlockState.GONE
                    continue
                try:
                    if isinstance(head, Misfit):
                        raise BadEnvelope(head.value)
                    ttl_s = self._tier.envelopes.open(key, head, payload, slot)
                    batch.loaded.append((key, ttl_s))
                except BadEnvelope as error:
                    self._tell(str(error))
                    batch.damaged.append(key)
                    batch.failures[key] = BlockState.DAMAGED
        self._tier.availability.answered()
        self._tier.availability.reads.succeeded()
        if batch.damaged:
            store.drop(batch.damaged, self._tier.timeout_at())

    def _tell(self, kind: str) -> None:
        """Log the first unusable value of a kind: whoever writes one may write a million."""
        with self._lock:
            known = kind in self._told
            self._told.add(kind)
        if not known:
            logger.warning(
                "Tier %s: a value is unusable, and deleted: %s. cachescope_tier_keys_total counts "
                "further ones (outcome damaged)",
                self._tier.name,
                kind,
            )

    def _note(self, batch: _Batch) -> None:
        gone = (key for key, state in batch.failures.items() if state is BlockState.GONE)
        self._tier.states.note(gone, BlockState.GONE)
        self._tier.states.note(batch.damaged, BlockState.DAMAGED)
        counts = Counter(
            ("load", _OUTCOMES[state])
            for state in batch.failures.values()
            if state is not BlockState.DAMAGED
        )
        counts["load", "hit"] = len(batch.loaded)
        counts["load", "damaged"] = len(batch.damaged)
        self._tier.counts.update(counts)
