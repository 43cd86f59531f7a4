"""A remote tier, as the engine's scheduler sees it.

The scheduler calls a `RemoteTier` and is never kept waiting: threads of the tier's own talk to the
store. Three rules keep a broken store from being more than a cache miss:

- Whoever may write to a slot reports on it (`transfers`). A slot is reported failed by the very
  thread that was filling it, once it has stopped, or without any thread having begun; so nothing
  is written to a slot whose failure was reported.
- Every wait has a deadline (`inquiries`, `load_jobs`). A request waits for
  `Limits.load_deadline_s` in all, from its first question to its last block, and keeps what has
  arrived by then. Only while blocks keep coming it waits longer: up to `Limits.load_share` of the
  time in which it could have computed them.
- Every queue is bounded in bytes (`inquiries`, `store_jobs`). What does not fit is dropped and
  counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_cachescope.observations import Observations
from vllm_cachescope.tiers.availability import Availability
from vllm_cachescope.tiers.block_states import Absence, BlockState, BlockStates
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.envelope import Envelopes
from vllm_cachescope.tiers.fleet_purges import FleetPurges
from vllm_cachescope.tiers.inquiries import Inquiries, Lookup
from vllm_cachescope.tiers.inventory import Change, Inventory
from vllm_cachescope.tiers.jobs import Finished, LoadJob, Outgoing, Purge
from vllm_cachescope.tiers.key_counts import KeyCounts
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.load_jobs import LoadJobs
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.operation_times import OperationTimes
from vllm_cachescope.tiers.purge_notices import PurgeNotices
from vllm_cachescope.tiers.purges import Purges
from vllm_cachescope.tiers.store import Store
from vllm_cachescope.tiers.store_jobs import StoreJobs


class RemoteTier:
    """Looks up, loads and stores blocks in a store, on threads of its own.

    All methods are called from the scheduler's thread, and none of them waits for the store but
    `start`, `drain` and `close`. The order for each request:

    1. `lookup` for each key, in each step until none is answered RETRY; `flush` ends the step.
    2. `load` for those that were hits, once, if at all; `finished` tells how it went. What is
       loaded in parts begins anew with 1 after `resume`.
    3. `end_request`, also before the request starts anew.

    Args:
        name: the tier's name.
        new_store: makes a store for one thread; must not connect yet.
        slot_bytes: bytes per block.
        envelopes: seals and opens the values.
        limits: what the tier may cost.
        clock: seconds, never running backwards; also the clock of all deadlines.
        random: a number in [0, 1).
        local_usage: finds the entries that are too many; None if there are no quotas, or the store
            counts itself.
        inventory: is kept up to date with what this engine has stored; None if nobody asks.
        notices: seals what engines on one store tell each other of purges; None if they do not.
        engine_name: what an operator knows the engine by.

    Attributes:
        fleet: the purges of all engines on the store; None where the store keeps no log of them.
    """

    def __init__(
        self,
        name: str,
        new_store: Callable[[], Store],
        slot_bytes: int,
        envelopes: Envelopes,
        limits: Limits,
        clock: Callable[[], float],
        random: Callable[[], float],
        local_usage: LocalUsage | None = None,
        inventory: Inventory | None = None,
        notices: PurgeNotices | None = None,
        engine_name: str = "",
    ) -> None:
        self.name = name
        store = new_store()
        self.address = store.address
        self._availability = Availability(
            name, self.address, limits, clock, random, self._store_came_up, self._store_went_down
        )
        self._tier = TierContext(
            name,
            new_store,
            slot_bytes,
            envelopes,
            limits,
            clock,
            self._availability,
            BlockStates(inventory),
            KeyCounts(),
            OperationTimes(name),
            local_usage,
            inventory,
        )
        self._inquiries = Inquiries(self._tier)
        self._load_jobs = LoadJobs(self._tier)
        self._store_jobs = StoreJobs(self._tier)
        self._purges = Purges(self._tier, self._store_jobs)
        self.fleet: FleetPurges | None = None
        if notices is not None and store.purge_log() is not None:
            self.fleet = FleetPurges(self._tier, notices, engine_name)

    def start(self) -> None:
        """Start the threads, and wait a moment for the store's first answer, so that what is
        wrong with it is said at start-up. A store that is down does not keep the tier from
        starting; it is asked again."""
        self._inquiries.start()
        self._load_jobs.start()
        self._store_jobs.start()
        self._purges.start()
        if self.fleet is not None:
            self.fleet.start()
        self._availability.wait_for_first_greeting(self._tier.limits.timeout_s)

    @property
    def usable(self) -> bool:
        """Whether the store answers and the tier may run on it."""
        return self._availability.usable

    def _store_came_up(self) -> None:
        if self.fleet is not None:
            self.fleet.wake()
        self._load_jobs.wake()
        self._store_jobs.wake()

    def _store_went_down(self, reason: str) -> None:
        # Loads and stores that wait are dropped by the scheduler's thread in its next step.
        self._purges.end(reason)
        self._inquiries.wake()

    # Lookups.

    def lookup(self, request_id: str, key: bytes) -> Lookup:
        """Return whether the request may load ``key``: the store holds it, as far as is known, and
        there is room to load it. `flush` sends the question.

        Entries that a purge under way reaches are misses, whatever the store holds still.
        """
        found = self.peek(request_id, key)
        inquiry = self._inquiries.open(request_id) if found is Lookup.HIT else None
        if inquiry is None:
            return found
        return self._inquiries.promise(inquiry, key, self._load_jobs.room_bytes)

    def peek(self, request_id: str, key: bytes) -> Lookup:
        """Return whether the store holds ``key``, as `lookup` does, but promise no load."""
        inquiry = self._inquiries.open(request_id)
        if inquiry is None or inquiry.over or self._purges.reaches(key):
            return Lookup.MISS
        return self._inquiries.ask(inquiry, key)

    @property
    def load_room(self) -> int:
        """How many more blocks may be loaded at the same time."""
        return self._load_jobs.room_bytes // self._tier.slot_bytes

    @property
    def loads(self) -> bool:
        """Whether blocks are being loaded."""
        return self._load_jobs.nbytes > 0

    @property
    def most_loads(self) -> int:
        """How many blocks may be loaded at the same time if no others are."""
        return self._tier.limits.inflight_bytes // self._tier.slot_bytes

    def restart(self, request_id: str) -> None:
        """Let a request wait for the tier for its deadline from now on: until now it has waited
        for room."""
        self._inquiries.restart(request_id)

    def limit(self, request_id: str, keys: int | None) -> None:
        """Let a request load no more than ``keys`` blocks in one go; None for no such limit."""
        self._inquiries.limit(request_id, keys)

    def resume(self, request_id: str) -> bool:
        """Let a request that has loaded a part of what was found for it load more. To be called
        once the part is where no further load can push it out.

        Returns:
            Whether it may: nothing has failed for it until now.
        """
        return self._inquiries.resume(request_id)

    def give_up(self, request_id: str, why: str) -> None:
        """Let a request load nothing of what was found for it.

        Args:
            request_id: the request.
            why: the reason in a few words, for the report on the prompt.
        """
        self._inquiries.give_up(request_id, why)

    def flush(self) -> None:
        """Send what was asked in this step, as one batch. To be called at the end of each step."""
        self._inquiries.flush()

    def end_request(self, request_id: str) -> None:
        """The request is over, or starts anew. A load for it goes on until it is `finished`."""
        self._inquiries.end(request_id)

    def load_failure(self, request_id: str, key: bytes) -> Absence | None:
        """Return why ``key`` was found for the request and not loaded; None if the store was not
        known to hold it. To be asked before `end_request`."""
        return self._inquiries.load_failure(request_id, key)

    def absence(self, request_id: str, key: bytes) -> Absence | None:
        """Return why the tier had no answer for the request, or did not hold ``key``; None if it
        was asked and, as far as is known, never held the key."""
        return self._inquiries.absence(request_id, key)

    def touch(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Let each key live until its time at least, in the store if that holds it.

        Args:
            entries: keys, each with its time on the tier's clock, in seconds; see `expiry.expiry`.
        """
        self._inquiries.touch(entries)

    # Transfers.

    def load(
        self,
        job_id: int,
        request_id: str,
        keys: Sequence[bytes],
        slots: Sequence[memoryview],
        worth_s: float = 0.0,
    ) -> None:
        """Load each key into its slot; `finished` tells which ones were.

        The caller neither reads nor writes the slots before that, and `lookup` has answered HIT
        for all keys: that is how the bytes under way stay bounded.

        Args:
            job_id: the job's number.
            request_id: for whom.
            keys: the keys, in the order of the prompt.
            slots: where each goes.
            worth_s: how long computing them would take, in seconds; 0 if that is not known.
        """
        limits, now = self._tier.limits, self._tier.clock()
        inquiry = self._inquiries.begin_load(request_id)
        promised_until = now + limits.load_deadline_s if inquiry is None else inquiry.deadline
        asked_at = promised_until - limits.load_deadline_s
        deadline = max(promised_until, asked_at + limits.load_share * worth_s)
        failures = {} if inquiry is None else inquiry.failures
        self._load_jobs.submit(
            LoadJob(job_id, request_id, keys, slots, now, promised_until, deadline, failures)
        )

    def is_loading(self, request_id: str) -> bool:
        """Whether a load for the request is under way. To be asked in each step."""
        return self._load_jobs.is_loading(request_id)

    def store(self, job_id: int, blocks: Sequence[Outgoing], complete: bool = True) -> None:
        """Store blocks that the store does not hold yet.

        The slots stay as they are until `finished` returns the job.

        Args:
            job_id: the job's number.
            blocks: the blocks in prompt order; those at the end are dropped if there are too many.
            complete: whether these are all blocks of the job.
        """
        kept = [block for block in blocks if not self._purges.reaches(block.key)]
        self._store_jobs.submit(job_id, kept, complete and len(kept) == len(blocks))

    def note_over_quota(self, keys: Iterable[bytes]) -> None:
        """Note that ``keys`` are not to be stored: their prompt is longer than the organisation's
        quota."""
        self._tier.states.note(keys, BlockState.CUT)

    def purge(self, prefix: bytes) -> Purge:
        """Begin to delete every entry whose key begins with ``prefix``: nothing, an organisation's
        tag, or an owner. Until that is over, they are misses, and none of them is stored."""
        return self._purges.begin(prefix)

    def finished(self) -> list[Finished]:
        """Return the loads and stores that are over since the last time. Nothing touches their
        slots any more."""
        return [*self._load_jobs.take_finished(), *self._store_jobs.take_finished()]

    def drain(self) -> None:
        """Drop what no thread has begun, and wait until the threads are done with the rest, which
        is over by its deadline."""
        for jobs in (self._load_jobs, self._store_jobs):
            jobs.drop_queued()
        for jobs in (self._load_jobs, self._store_jobs):
            jobs.wait_idle()

    def close(self) -> None:
        """End the threads and their connections.

        Raises:
            RuntimeError: if a thread still uses a slot.
        """
        limits, clock = self._tier.limits, self._tier.clock
        fleet = () if self.fleet is None else (self.fleet,)
        for part in (self._load_jobs, self._store_jobs, self._purges, self._inquiries, *fleet):
            part.stop()
        self._purges.end("the engine is going down")
        deadline = clock() + 2 * max(limits.timeout_s, limits.load_deadline_s)
        for part in (*fleet, self._inquiries, self._store_jobs, self._purges, self._load_jobs):
            part.join(deadline)
        if self._load_jobs.busy or self._store_jobs.busy:
            raise RuntimeError(f"tier {self.name}: a transfer does not end")

    # What routers are told.

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` returns anything."""
        return self._tier.inventory is not None and self._tier.inventory.has_changes

    def take_changes(self) -> list[Change]:
        """Return what of this engine's entries came and went since the last time."""
        return [] if self._tier.inventory is None else self._tier.inventory.take_changes()

    def held(self) -> list[bytes]:
        """Return the keys of this engine's entries, as far as they are kept for routers."""
        return [] if self._tier.inventory is None else self._tier.inventory.held()

    # Statistics and health.

    def take_stats(self) -> Counter[tuple[str, str]]:
        """Return how many keys had which ``(operation, outcome)`` since the last time; the
        operation ``evict`` has reasons for outcomes."""
        return self._tier.counts.take()

    def take_times(self) -> Observations:
        """Return how long exchanges with the store took since the last time, in seconds, by the
        tier's name, operation and ``ok`` or ``failed``."""
        return self._tier.times.take()

    def queues(self) -> dict[str, int]:
        """Return how many keys wait or are under way, by what is to be done with them."""
        slot_bytes = self._tier.slot_bytes
        return {
            "lookup": self._inquiries.asking,
            "touch": self._inquiries.touching,
            "load": self._load_jobs.nbytes // slot_bytes,
            "store": self._store_jobs.nbytes // slot_bytes,
        }

    @property
    def slot_bytes(self) -> int:
        """Bytes per block."""
        return self._tier.slot_bytes

    def health(self) -> dict[str, Any]:
        """Return the tier's state in plain data."""
        usage = self._tier.local_usage
        return {
            "name": self.name,
            "address": self.address,
            **self._availability.health(),
            "loading_bytes": self._load_jobs.nbytes,
            "storing_bytes": self._store_jobs.nbytes,
            **self._availability.known,
            **({} if usage is None else {"orgs": usage.shown(self._tier.clock())}),
        }
