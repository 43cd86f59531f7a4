"""What one engine has stored in a tier, where the store itself keeps no account of whose it is."""

import heapq
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from vllm_cachescope.cache.quotas import SHOWN_ORGS, Quotas
from vllm_cachescope.tenancy.owner_tags import org_of


class LocalUsage:
    """Knows which entries are too many: those that expire first. Safe for all threads.

    It counts what this engine has stored and what has not expired since it used it last. What
    other engines have stored it does not know, nor what this one stored before it was restarted.

    Args:
        shares: what each organisation may have.
    """

    def __init__(self, shares: Quotas) -> None:
        self._shares = shares
        self._orgs: defaultdict[bytes, _Holding] = defaultdict(_Holding)
        self._lock = threading.Lock()

    def stored(self, entries: Iterable[tuple[bytes, float]], now: float) -> list[bytes]:
        """Count entries that were stored; return the keys of those that must go, the first to
        expire first, which are counted no longer.

        Args:
            entries: their keys (see `keyspace.qualified`), each with when it expires, in seconds.
            now: current time in seconds.
        """
        with self._lock:
            orgs = set()
            for key, until in entries:
                self._orgs[org_of(key)].keep(key, until)
                orgs.add(org_of(key))
            self._drop_expired(now)
            gone: list[bytes] = []
            for org in orgs & self._orgs.keys():
                held = self._orgs[org]
                gone += [held.pop() for _ in range(self._shares.over(org, len(held)))]
            return gone + self._over_capacity()

    def used(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Note until when entries live on; one that is not counted is ignored."""
        with self._lock:
            for key, until in entries:
                held = self._orgs.get(org_of(key))
                if held is not None and key in held:
                    held.keep(key, until)

    def purged(self, prefix: bytes) -> None:
        """Note that the entries whose owner begins with ``prefix`` are gone."""
        with self._lock:
            for held in self._orgs.values():
                held.purge(prefix)

    def shown(self, now: float) -> dict[str, int]:
        """Return the bytes of the organisations that hold most, by their tags in hex.

        Args:
            now: current time in seconds.
        """
        with self._lock:
            self._drop_expired(now)
            held = Counter({org: len(entries) for org, entries in self._orgs.items()})
        return {
            org.hex(): entries * self._shares.entry_bytes
            for org, entries in held.most_common(SHOWN_ORGS)
        }

    def _drop_expired(self, now: float) -> None:
        for org, held in list(self._orgs.items()):
            while (first := held.first()) is not None and first <= now:
                held.pop()
            if not held:
                del self._orgs[org]

    def _over_capacity(self) -> list[bytes]:
        """Give up what organisations hold too much together: the first to expire of those that
        hold more than their reserve, and of the others if that is not enough."""
        if self._shares.capacity is None:
            return []
        over = sum(map(len, self._orgs.values())) - self._shares.capacity
        gone: list[bytes] = []
        for spared in (False, True):
            if len(gone) >= over:
                break
            firsts = [
                (first, org)
                for org in self._orgs
                if (first := self._first(org, spared)) is not None
            ]
            heapq.heapify(firsts)
            while firsts and len(gone) < over:
                _, org = firsts[0]
                gone.append(self._orgs[org].pop())
                if (first := self._first(org, spared)) is None:
                    heapq.heappop(firsts)
                else:
                    heapq.heapreplace(firsts, (first, org))
        return gone

    def _first(self, org: bytes, spared: bool) -> float | None:
        """Return when the first entry of an organisation expires that may go."""
        held = self._orgs[org]
        return held.first() if spared or len(held) > self._shares.reserve(org) else None


class _Holding:
    """What one organisation holds, in the order in which it expires."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}
        # An item for each key, with a time that it had once: times only grow.
        self._heap: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key: bytes) -> bool:
        return key in self._until

    def keep(self, key: bytes, until: float) -> None:
        """Hold ``key`` until a time, if not for longer already."""
        if key not in self._until:
            heapq.heappush(self._heap, (until, key))
        self._until[key] = max(until, self._until.get(key, until))

    def first(self) -> float | None:
        """Return when the first one expires; None if there is none."""
        while self._heap:
            at, key = self._heap[0]
            if (until := self._until[key]) == at:
                return until
            heapq.heapreplace(self._heap, (until, key))
        return None

    def pop(self) -> bytes:
        """Let go of the first one to expire."""
        self.first()
        _, key = heapq.heappop(self._heap)
        del self._until[key]
        return key

    def purge(self, prefix: bytes) -> None:
        """Let go of all whose key begins with ``prefix``."""
        self._until = {k: until for k, until in self._until.items() if not k.startswith(prefix)}
        self._heap = [(until, key) for key, until in self._until.items()]
        heapq.heapify(self._heap)
