"""The stores under way, and the thread that writes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.block_states import BlockState
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.jobs import Finished, Outgoing, StoreJob
from vllm_cachescope.tiers.store import Store, StoreFailed, Written
from vllm_cachescope.tiers.transfers import Transfers

logger = logger_of(__name__)

WRITE_BATCH_BYTES = 8 << 20
"""Bytes that the thread stores at once: so many that the pauses between batches, in which the
thread waits for answers and seals the next values, hardly count."""

_STATES = {Written.REFUSED: BlockState.REFUSED, Written.EXPIRED: BlockState.GONE}
"""The states of blocks that were to be written, where that is not `BlockState.HELD`."""


class StoreJobs(Transfers[StoreJob]):
    """The stores under way; see `Transfers`.

    One thread writes. The queue is bounded by ``Limits.inflight_bytes``: what does not fit is
    dropped at once, and counted.
    """

    def __init__(self, tier: TierContext) -> None:
        super().__init__(tier, ["write"], WRITE_BATCH_BYTES)

    def submit(self, job_id: int, blocks: Sequence[Outgoing], complete: bool) -> None:
        """Begin to store blocks. Those that there is no room for, or all if the store cannot be
        written to now, are dropped.

        Args:
            job_id: the job's number.
            blocks: the blocks in prompt order; those at the end are dropped if there are too many.
            complete: whether these are all blocks of the job.
        """
        availability = self._tier.availability
        with self._lock:
            room_bytes = self._tier.limits.inflight_bytes - self._nbytes
            room, state = max(0, room_bytes) // self._tier.slot_bytes, BlockState.DROPPED
            if not availability.usable:
                room, state = 0, BlockState.UNSTORED
            elif availability.writes.probe_in() > 0:
                room, state = 0, BlockState.REFUSED
            kept, dropped = blocks[:room], blocks[room:]
            if dropped:
                self._tier.states.note((block.key for block in dropped), state)
                self._tier.counts.add("store", "dropped", len(dropped))
            job = StoreJob(job_id, kept, self._tier.clock(), complete and not dropped)
            if not kept:
                self._finished.put(self._result(job))
                return
            self._nbytes += len(kept) * self._tier.slot_bytes
            self._jobs.append(job)
            self._work.notify()

    def drop(self, prefix: bytes) -> int:
        """Drop what was to be stored under keys that begin with ``prefix``. Return how many batches
        the thread has begun: in one of them it may be writing such a key; see
        `wait_for_batches`."""
        with self._lock:
            for job in list(self._jobs):
                self._drop_blocks(job, lambda block: block.key.startswith(prefix), "dropped")
            return self._begun

    def wait_for_batches(self, begun: int) -> None:
        """Wait until the first ``begun`` batches are over; each of them has a deadline."""
        with self._lock:
            self._idle.wait_for(lambda: self._begun - self._batches >= begun)

    def _drop_overdue(self) -> None:
        if not self._tier.availability.usable:
            self._drop_queued()

    def _drop_untaken(self, job: StoreJob, outcome: str) -> None:
        self._drop_blocks(job, lambda block: True, outcome)

    def _drop_blocks(
        self, job: StoreJob, is_dropped: Callable[[Outgoing], bool], outcome: str
    ) -> None:
        """Drop those blocks of a queued job that no thread has taken. Needs the lock."""
        taken, untaken = job.blocks[: job.taken], job.blocks[job.taken :]
        dropped = [block for block in untaken if is_dropped(block)]
        kept = [block for block in untaken if not is_dropped(block)]
        if not kept:
            self._jobs.remove(job)
        if dropped:
            self._tier.states.note((block.key for block in dropped), BlockState.UNSTORED)
            self._tier.counts.add("store", outcome, len(dropped))
            job.blocks = [*taken, *kept]
            job.complete = False
            self._settle(job, len(dropped))

    def _result(self, job: StoreJob) -> Finished:
        seconds = self._tier.clock() - job.started
        return Finished(job.job_id, job.complete, (), None, job.nbytes, seconds)

    # The thread that writes.

    def _move(self, store: Store, job: StoreJob, first: int, last: int) -> None:
        blocks = job.blocks[first:last]
        written: list[Written] = []
        try:
            with (
                self._tier.envelopes.sealing(blocks) as values,
                self._tier.times.measure("store"),
            ):
                written = store.write(values, self._tier.timeout_at())
            self._note(store, blocks, written)
            stored = _expiries(blocks, written, Written.STORED)
            if self._tier.inventory is not None:
                self._tier.inventory.stored(stored)
                self._tier.inventory.touch(_expiries(blocks, written, Written.PRESENT))
            self._keep_quotas(store, stored)
        except StoreFailed as error:
            self._tier.availability.failed(str(error))
        except Exception:
            # A mistake of ours must not keep slots for ever.
            logger.exception("Tier %s: a store failed", self._tier.name)
            store.close()
        counts = Counter(("store", result.value) for result in written)
        if not written:
            counts["store", "failed"] = len(blocks)
            self._tier.states.note((block.key for block in blocks), BlockState.UNSTORED)
        self._tier.counts.update(counts)
        new = written.count(Written.STORED)
        with self._lock:
            job.nbytes += new * self._tier.slot_bytes
            job.complete &= new + written.count(Written.PRESENT) == len(blocks)
            self._settle(job, len(blocks))

    def _note(self, store: Store, blocks: Sequence[Outgoing], written: Sequence[Written]) -> None:
        availability = self._tier.availability
        states: defaultdict[BlockState, list[bytes]] = defaultdict(list)
        for block, result in zip(blocks, written, strict=True):
            states[_STATES.get(result, BlockState.HELD)].append(block.key)
        for state, keys in states.items():
            self._tier.states.note(keys, state)
        availability.answered()
        if Written.REFUSED in written:
            availability.write_refused(store.refusal)
        else:
            availability.writes.succeeded()

    def _keep_quotas(self, store: Store, stored: Sequence[tuple[bytes, float]]) -> None:
        """Evict what organisations hold beyond their quotas, if the store has not done it.

        Args:
            store: the store.
            stored: keys that were just stored, each with when it expires, in seconds.
        """
        evicted = store.take_evicted()
        if self._tier.local_usage is not None:
            over = self._tier.local_usage.stored(stored, self._tier.clock())
            if over:
                store.drop(over, self._tier.timeout_at())
                evicted += over
        self._tier.states.note(evicted, BlockState.CUT)
        self._tier.counts.add("evict", "quota", len(evicted))


def _expiries(
    blocks: Sequence[Outgoing], written: Sequence[Written], outcome: Written
) -> list[tuple[bytes, float]]:
    """Return the keys of the blocks with ``outcome``, each with when it expires, in seconds."""
    return [
        (block.key, block.expires_at)
        for block, result in zip(blocks, written, strict=True)
        if result is outcome
    ]
