"""What one engine has stored in a tier, where the store itself keeps no account of whose it is."""

import threading
from collections import Counter
from collections.abc import Sequence

from vllm_cachescope.eviction import LifetimeShare
from vllm_cachescope.ledger import Ledger
from vllm_cachescope.owners import NOBODY, org_of
from vllm_cachescope.shares import SHOWN_ORGS, Shares

_TIER = "here"


class Account:
    """Knows which entries are too many. Safe for all threads.

    It counts what this engine has stored and what has not expired since it used it last. What
    other engines have stored it does not know, nor what this one stored before it was restarted.

    Args:
        shares: what each organisation may have.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._ledger = Ledger()
        self._order = LifetimeShare(shares.reserve)
        self._ledger.follow(_TIER, self._order)
        self._lock = threading.Lock()

    def stored(self, keys: Sequence[tuple[bytes, int]], now: float) -> list[bytes]:
        """Count entries that were stored; return those that must go, oldest first, which are
        counted no longer.

        Args:
            keys: their keys (see `keyspace.qualified`) in prompt order, each with its lifetime in
                seconds.
            now: current time in seconds.
        """
        with self._lock:
            self._ledger.pop_expired(now)
            orgs = set()
            for key, ttl_s in reversed(keys):
                self._ledger.touch(key, ttl_s, now, key[: len(NOBODY)])
                self._ledger.place(key, _TIER)
                orgs.add(org_of(key))
            gone: list[bytes] = []
            for org in orgs:
                over = self._shares.over(org, self._order.held(org))
                gone += self._give_up(self._order.victims_of(org, over, now, lambda key: False))
            if self._shares.capacity is not None:
                over = max(0, len(self._order) - self._shares.capacity)
                gone += self._give_up(self._order.victims(over, now, lambda key: False) or [])
            return gone

    def used(self, keys: Sequence[bytes], now: float) -> None:
        """Note that entries were used, those to be kept longest first; one that is not counted is
        ignored."""
        with self._lock:
            self._ledger.pop_expired(now)
            for key in reversed(keys):
                if (entry := self._ledger.get(key)) is not None:
                    self._ledger.touch(key, entry.ttl_s, now)

    def purged(self, prefix: bytes) -> None:
        """Note that the entries whose owner begins with ``prefix`` are gone."""
        with self._lock:
            self._ledger.purge(prefix)

    def shown(self) -> dict[str, int]:
        """Return the bytes of the organisations that hold most, by their tags in hex."""
        with self._lock:
            held = Counter(self._ledger.held(_TIER))
        return {
            org.hex(): entries * self._shares.entry_bytes
            for org, entries in held.most_common(SHOWN_ORGS)
        }

    def _give_up(self, keys: list[bytes]) -> list[bytes]:
        for key in keys:
            self._ledger.displace(key, _TIER)
        return keys
