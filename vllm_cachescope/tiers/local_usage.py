"""Local usage: what organisations hold in a tier, counted by one engine for its own stores."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from vllm_cachescope.cache.expiry_queue import ExpiryQueue
from vllm_cachescope.cache.quotas import SHOWN_ORGS, Quotas
from vllm_cachescope.tenancy.owner_tags import org_of


class LocalUsage:
    """Finds the entries beyond an organisation's quota, and those beyond the tier's capacity.

    The engine counts the entries that it has stored itself, until they expire: it knows neither
    what other engines have stored, nor what it stored before it was restarted. Safe to use from
    several threads.

    Args:
        quotas: what each organisation may hold.
    """

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._orgs: defaultdict[bytes, ExpiryQueue[bytes, float]] = defaultdict(ExpiryQueue)
        self._lock = threading.Lock()

    def stored(self, entries: Iterable[tuple[bytes, float]], now: float) -> list[bytes]:
        """Count entries that were stored; return the keys of those that are too many.

        The keys that are returned are not counted any more: the caller drops them from the store.
        They are the first to expire of their organisation, in this order.

        Args:
            entries: their keys (see `keyspace.qualified`), each with when it expires, in seconds.
            now: current time in seconds.
        """
        with self._lock:
            orgs = set()
            for key, expires_at in entries:
                held = self._orgs[org_of(key)]
                held.set(key, max(expires_at, held.time_of(key) or expires_at))
                orgs.add(org_of(key))
            self._drop_expired(now)
            evicted: list[bytes] = []
            for org in orgs & self._orgs.keys():
                held = self._orgs[org]
                evicted += [held.pop()[0] for _ in range(self._quotas.over(org, len(held)))]
            return evicted + self._over_capacity()

    def touch(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Count entries until a later time; one that is not counted is ignored.

        Args:
            entries: their keys, each with when it expires now, in seconds.
        """
        with self._lock:
            for key, expires_at in entries:
                held = self._orgs.get(org_of(key))
                if held is not None and (known := held.time_of(key)) is not None:
                    held.set(key, max(expires_at, known))

    def purged(self, prefix: bytes) -> None:
        """Count the entries no longer whose owner begins with ``prefix``."""
        with self._lock:
            for held in self._orgs.values():
                for key in [key for key in held if key.startswith(prefix)]:
                    held.drop(key)

    def shown(self, now: float) -> dict[str, int]:
        """Return the bytes of the organisations that hold most, by their tags in hex.

        Args:
            now: current time in seconds.
        """
        with self._lock:
            self._drop_expired(now)
            held = Counter({org: len(entries) for org, entries in self._orgs.items()})
        return {
            org.hex(): entries * self._quotas.entry_bytes
            for org, entries in held.most_common(SHOWN_ORGS)
        }

    def _drop_expired(self, now: float) -> None:
        for org, held in list(self._orgs.items()):
            for _ in held.pop_expired(now):
                pass
            if not held:
                del self._orgs[org]

    def _over_capacity(self) -> list[bytes]:
        """Return the keys of what all organisations together hold beyond the capacity, and count
        them no longer.

        Organisations that hold more than their reserve are evicted from first, the others only if
        that is not enough. Of the entries in question the first to expire are evicted.
        """
        if self._quotas.capacity is None:
            return []
        over = sum(map(len, self._orgs.values())) - self._quotas.capacity
        evicted: list[bytes] = []
        for within_reserve in (False, True):
            if len(evicted) >= over:
                break
            # The organisations, each under the time of its first entry that may be evicted.
            firsts = ExpiryQueue[bytes, float]()
            for org in self._orgs:
                if (first := self._first(org, within_reserve)) is not None:
                    firsts.set(org, first)
            while firsts and len(evicted) < over:
                org, _ = firsts.pop()
                evicted.append(self._orgs[org].pop()[0])
                if (first := self._first(org, within_reserve)) is not None:
                    firsts.set(org, first)
        return evicted

    def _first(self, org: bytes, within_reserve: bool) -> float | None:
        """Return when the first entry of ``org`` expires; None if none may be evicted."""
        held = self._orgs[org]
        may_evict = within_reserve or len(held) > self._quotas.reserve(org)
        return held.first() if may_evict else None
