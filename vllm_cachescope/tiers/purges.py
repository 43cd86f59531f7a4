"""The purges under way, and the thread that carries them out beside the one that writes."""

import threading
from collections import Counter, deque

from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.jobs import Purge
from vllm_cachescope.tiers.joining import join
from vllm_cachescope.tiers.store import Store, StoreFailed
from vllm_cachescope.tiers.store_jobs import StoreJobs

logger = logger_of(__name__)

PURGE_S = 60.0
"""How long a purge may take, in seconds; the store answers each of its steps within the timeout."""


class Purges:
    """The purges of a tier. Stores of others go on meanwhile; of the owners that are purged nothing
    is written from the moment a purge begins until it is over.

    Purges that wait and name the same owners are one. `begin` and `reaches` are called on the
    scheduler's thread and do not wait for the store.

    Args:
        tier: the tier's context.
        stores: the stores under way.
    """

    def __init__(self, tier: TierContext, stores: StoreJobs) -> None:
        self._tier = tier
        self._stores = stores
        self._work = threading.Condition()
        # Under the lock of `_work`. The first one may have begun.
        self._queue: deque[Purge] = deque()
        self._begun: Purge | None = None
        self._prefixes: Counter[bytes] = Counter()
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, name=f"cachescope-{tier.name}-purge", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self, prefix: bytes) -> Purge:
        """Begin to delete every entry whose key begins with ``prefix``. What was to be stored
        under such a key is dropped.

        Args:
            prefix: nothing, an organisation's tag, or an owner.
        """
        batches = self._stores.drop(prefix)
        with self._work:
            for purge in self._queue:
                if purge.prefix == prefix and purge is not self._begun:
                    return purge
            purge = Purge(prefix, batches)
            availability = self._tier.availability
            # A store that fails right after this check has `end` called, which waits for the lock
            # and ends this purge too.
            if availability.usable and not self._stopping:
                self._queue.append(purge)
                self._prefixes[prefix] += 1
                self._work.notify()
            else:
                purge.end(availability.reason or "it has not answered yet")
        return purge

    def reaches(self, key: bytes) -> bool:
        """Whether a purge under way reaches ``key``."""
        prefixes = self._prefixes
        if not prefixes:
            return False
        return key[: len(NOBODY)] in prefixes or org_of(key) in prefixes or b"" in prefixes

    def end(self, reason: str) -> None:
        """End the purges that the thread cannot carry out. Called on any thread."""
        with self._work:
            for purge in list(self._queue):
                self._end(purge, reason)

    def stop(self) -> None:
        """Have the thread end; `join` waits for that."""
        with self._work:
            self._stopping = True
            self._work.notify()

    def join(self, deadline: float) -> None:
        """Wait until the thread has ended, or for the deadline on the tier's clock."""
        join([self._thread], deadline, self._tier.clock)

    def _end(self, purge: Purge, reason: str | None) -> None:
        """End a purge, unless another thread has. Needs the lock."""
        if purge in self._queue:
            self._queue.remove(purge)
            self._prefixes[purge.prefix] -= 1
            self._prefixes += Counter()
            purge.end(reason)

    # The thread.

    def _run(self) -> None:
        store = self._tier.new_store()
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopping or self._queue)
                if self._stopping:
                    break
                purge = self._begun = self._queue[0]
            self._carry_out(store, purge)
        store.close()

    def _carry_out(self, store: Store, purge: Purge) -> None:
        # What is being written now may be the owner's.
        self._stores.wait_for_batches(purge.batches)
        entries, reason = 0, None
        try:
            # A server closes connections that idle, as this one does.
            if not store.alive():
                store.connect(self._tier.timeout_at())
            entries = store.purge(purge.prefix, self._tier.clock() + PURGE_S)
        except StoreFailed as error:
            reason = str(error)
        except Exception as error:
            logger.exception("Tier %s: a purge failed", self._tier.name)
            store.close()
            reason = str(error)
        if reason is None:
            self._tier.states.purged(purge.prefix)
        if self._tier.local_usage is not None:
            self._tier.local_usage.purged(purge.prefix)
        if self._tier.inventory is not None:
            self._tier.inventory.purged(purge.prefix)
        self._tier.counts.add("evict", "purge", entries)
        with self._work:
            self._begun = None
            # `end` may have ended it meanwhile.
            if not purge.over:
                purge.entries = entries
            self._end(purge, reason)
