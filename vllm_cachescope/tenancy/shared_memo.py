"""A memo that organisations share, and in which none pushes out another's share."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from vllm_cachescope.tenancy.shares import AccountOf, Shares, own_account

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class SharedMemo(Generic[_K, _V]):
    """Values by organisation and key.

    What one organisation has put in, no other finds: not even by how long an answer takes. When
    memory is short, the account that holds most gives way, its least recently used values first.
    Safe for threads.

    Args:
        limit: how much is kept, in the unit of ``size_of``.
        size_of: returns the size of a value, which must not change.
        account_of: returns who answers for an organisation.
    """

    def __init__(
        self,
        limit: int,
        size_of: Callable[[_V], int] = lambda _: 1,
        account_of: AccountOf = own_account,
    ) -> None:
        self._limit = limit
        self._size_of = size_of
        self._account_of = account_of
        self._lock = Lock()
        self._shares = Shares()
        # By account, the least recently used first.
        self._values: dict[str, OrderedDict[tuple[str, _K], _V]] = {}

    def __len__(self) -> int:
        """Return how many values are kept."""
        return sum(len(values) for values in self._values.values())

    @property
    def size(self) -> int:
        """How much is kept, in the unit of the limit."""
        return self._shares.total

    def get(self, org: str, key: _K) -> _V | None:
        """Return what ``org`` has under ``key``; None if nothing is kept there. That is a use."""
        with self._lock:
            values = self._values.get(self._account_of(org))
            if values is None or (org, key) not in values:
                return None
            values.move_to_end((org, key))
            return values[org, key]

    def put(self, org: str, key: _K, value: _V) -> None:
        """Keep ``value``, unless it alone is larger than the limit."""
        size = self._size_of(value)
        if size > self._limit:
            return
        account = self._account_of(org)
        with self._lock:
            values = self._values.setdefault(account, OrderedDict())
            if (old := values.pop((org, key), None)) is not None:
                size -= self._size_of(old)
            values[org, key] = value
            self._shares.add(account, size)
            while self._shares.total > self._limit:
                self._drop_oldest(self._shares.largest())

    def of(self, org: str | None) -> list[_V]:
        """Return the values of ``org``, or of all with None; of each account the least recently
        used first."""
        with self._lock:
            accounts = list(self._values) if org is None else [self._account_of(org)]
            return [
                value
                for account in accounts
                for (owner, _), value in self._values.get(account, {}).items()
                if org in (None, owner)
            ]

    def newest(
        self,
        org: str | None,
        limit: int,
        is_after: Callable[[_V], bool],
        skips: Callable[[_V], bool],
    ) -> list[_V]:
        """Return at most ``limit`` values of each account, the most recently used first, of ``org``
        or of all with None.

        Args:
            org: the organisation.
            limit: how many of each account.
            is_after: says no of the first value that is too old, where an account's end.
            skips: says of a value that it is left out.
        """
        found: list[_V] = []
        with self._lock:
            for account in list(self._values) if org is None else [self._account_of(org)]:
                left = limit
                for (owner, _), value in reversed(self._values.get(account, {}).items()):
                    if not left or not is_after(value):
                        break
                    if org in (None, owner) and not skips(value):
                        found.append(value)
                        left -= 1
        return found

    def orgs(self) -> set[str]:
        """Return the organisations of which values are kept."""
        with self._lock:
            return {org for values in self._values.values() for org, _ in values}

    def purge(
        self, org: str | None = None, matches: Callable[[_K, _V], bool] = lambda *_: True
    ) -> None:
        """Drop the values of ``org``, or of all with None, that ``matches`` says so of."""
        with self._lock:
            accounts = list(self._values) if org is None else [self._account_of(org)]
            for account in accounts:
                for (owner, key), value in list(self._values.get(account, {}).items()):
                    if org in (None, owner) and matches(key, value):
                        self._drop(account, owner, key)

    def _drop_oldest(self, account: str) -> None:
        org, key = next(iter(self._values[account]))
        self._drop(account, org, key)

    def _drop(self, account: str, org: str, key: _K) -> None:
        values = self._values[account]
        self._shares.add(account, -self._size_of(values.pop((org, key))))
        if not values:
            del self._values[account]
