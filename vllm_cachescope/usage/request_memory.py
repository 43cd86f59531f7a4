"""The memory of recent requests, in a process that keeps no ledger."""

import itertools
import math
import secrets

from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.usage.recent_requests import Numbered
from vllm_cachescope.usage.record import RequestRecord

REMEMBERED_BYTES = 48 * 2**20
"""How much memory the records take, in bytes, about: 50,000 of them."""

RECORD_BYTES = 600
"""Memory that a record takes besides its names and rows, in bytes, about."""

ROW_BYTES = 100
"""Memory that a row of a record takes, in bytes, about."""


class RequestMemory:
    """Recent requests in this process's memory, within a bound that accounts share. Safe for
    threads.

    Args:
        account_of: returns who answers for an organisation.
        limit: how much memory the records may take, in bytes, about.
    """

    def __init__(self, account_of: AccountOf = own_account, limit: int = REMEMBERED_BYTES) -> None:
        self.name = secrets.token_hex(6)
        self._kept: SharedMemo[int, Numbered] = SharedMemo(limit, _nbytes, account_of)
        self._numbers = itertools.count(1)

    def add(self, record: RequestRecord) -> None:
        """Keep the record of a request that is over."""
        number = next(self._numbers)
        self._kept.put(record.org, number, Numbered(number, record))

    def newest(
        self, org: str | None, limit: int, after: int = 0, before: int | None = None
    ) -> list[Numbered]:
        """Return the newest requests; see `RecentRequests`. Takes no time for what is older
        than ``after`` or beyond the limit."""
        bound = math.inf if before is None else before
        found = self._kept.newest(
            org, limit, lambda kept: kept.number > after, lambda kept: kept.number >= bound
        )
        # Of several accounts, each of which is in order.
        found.sort(key=lambda kept: -kept.number)
        return found[:limit]

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the records of ``org``, or of one session of ``org``; with None, of everyone."""
        self._kept.purge(org, lambda _, kept: session in (None, kept.record.session))


def _nbytes(kept: Numbered) -> int:
    record = kept.record
    names = (record.org, record.session, record.model, record.request_id, record.path)
    text = sum(len(name) for name in names if name is not None)
    return RECORD_BYTES + ROW_BYTES * len(record.rows) + text
