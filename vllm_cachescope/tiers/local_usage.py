"""Local usage: what organisations hold in a tier, counted by one engine for its own stores."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from vllm_cachescope.cache.expiry_queue import ExpiryQueue
from vllm_cachescope.cache.quotas import SHOWN_ORGS, Quotas
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of


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
        self._accounts: defaultdict[bytes, ExpiryQueue[bytes, float]] = defaultdict(ExpiryQueue)
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
            accounts = set()
            for key, expires_at in entries:
                account = self._quotas.account_of(key)
                held = self._accounts[account]
                held.set(key, max(expires_at, held.time_of(key) or expires_at))
                accounts.add(account)
            self._drop_expired(now)
            evicted: list[bytes] = []
            for account in accounts & self._accounts.keys():
                held = self._accounts[account]
                evicted += [held.pop()[0] for _ in range(self._quotas.over(account, len(held)))]
            return evicted + self._over_capacity()

    def touch(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Count entries until a later time; one that is not counted is ignored.

        Args:
            entries: their keys, each with when it expires now, in seconds.
        """
        with self._lock:
            for key, expires_at in entries:
                held = self._accounts.get(self._quotas.account_of(key))
                if held is not None and (known := held.time_of(key)) is not None:
                    held.set(key, max(expires_at, known))

    def purged(self, prefix: bytes) -> None:
        """Count the entries no longer whose owner begins with ``prefix``."""
        with self._lock:
            account = self._quotas.account_of(prefix.ljust(len(NOBODY), b"\0"))
            reached = {account} & self._accounts.keys() if prefix else self._accounts.keys()
            for held in map(self._accounts.__getitem__, reached):
                for key in [key for key in held if key.startswith(prefix)]:
                    held.drop(key)

    def shown(self, now: float) -> dict[str, int]:
        """Return the bytes of the organisations that hold most, by their tags in hex.

        Args:
            now: current time in seconds.
        """
        with self._lock:
            self._drop_expired(now)
            held = Counter({account: len(entries) for account, entries in self._accounts.items()})
        return {
            org_of(account).hex(): entries * self._quotas.entry_bytes
            for account, entries in held.most_common(SHOWN_ORGS)
        }

    def _drop_expired(self, now: float) -> None:
        for account, held in list(self._accounts.items()):
            for _ in held.pop_expired(now):
                pass
            if not held:
                del self._accounts[account]

    def _over_capacity(self) -> list[bytes]:
        """Return the keys of what all organisations together hold beyond the capacity, and count
        them no longer.

        Organisations that hold more than their reserve are evicted from first, the others only if
        that is not enough. Of the entries in question the first to expire are evicted.
        """
        if self._quotas.capacity is None:
            return []
        over = sum(map(len, self._accounts.values())) - self._quotas.capacity
        evicted: list[bytes] = []
        for within_reserve in (False, True):
            if len(evicted) >= over:
                break
            # The accounts, each under the time of its first entry that may be evicted.
            firsts = ExpiryQueue[bytes, float]()
            for account in self._accounts:
                if (first := self._first(account, within_reserve)) is not None:
                    firsts.set(account, first)
            while firsts and len(evicted) < over:
                account, _ = firsts.pop()
                evicted.append(self._accounts[account].pop()[0])
                if (first := self._first(account, within_reserve)) is not None:
                    firsts.set(account, first)
        return evicted

    def _first(self, account: bytes, within_reserve: bool) -> float | None:
        """Return when the first entry of ``account`` expires; None if none may be evicted."""
        held = self._accounts[account]
        may_evict = within_reserve or len(held) > self._quotas.reserve(account)
        return held.first() if may_evict else None
