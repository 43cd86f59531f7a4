"""The details of recent requests: why each was read as far as it was, for the page."""

from collections.abc import Iterable

from vllm_cachescope.api.break_log import Break
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.usage.record import RequestRecord

REMEMBERED_BYTES = 24 * 2**20
"""How much memory the details take, in bytes, about: those of some 10,000 requests."""

_DETAILS_BYTES = 1500
_CHANGE_BYTES = 500

_Key = tuple[str, int]  # the request's id, and when it was over, in milliseconds


class RequestDetails:
    """Details by organisation and request. Safe for threads.

    Args:
        account_of: returns who answers for an organisation.
        limit: how much memory they may take, in bytes, about.
    """

    def __init__(self, account_of: AccountOf = own_account, limit: int = REMEMBERED_BYTES) -> None:
        self._kept: SharedMemo[_Key, Break] = SharedMemo(limit, _nbytes, account_of)

    def add(self, record: RequestRecord, details: Break) -> None:
        """Keep the details of the request that ``record`` is of."""
        self._kept.put(record.org, _key(record), details)

    def find(self, org: str | None, request_id: str, at_ms: int) -> Break | None:
        """Return the details of a request, if they are kept.

        Args:
            org: whose; None for anyone's.
            request_id: the response's id; empty for none.
            at_ms: when it was over, as the record's JSON has it, in milliseconds since the epoch.
        """
        orgs: Iterable[str] = self._kept.orgs() if org is None else (org,)
        found = (self._kept.get(one, (request_id, at_ms)) for one in orgs)
        return next((details for details in found if details is not None), None)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the details of ``org``, or of one session of ``org``; with None, of everyone."""
        self._kept.purge(org, lambda _, kept: session in (None, kept.caller.session))


def _key(record: RequestRecord) -> _Key:
    return record.request_id or "", round(round(record.at, 3) * 1000)


def _nbytes(details: Break) -> int:
    # What a client may make long, besides what cannot be.
    changes = details.diagnosis.changes
    texts = (
        text
        for change in changes
        for text in (change.path, change.before, change.after, *change.names, *change.fields)
        if text is not None
    )
    return (
        _DETAILS_BYTES
        + _CHANGE_BYTES * len(changes)
        + sum(map(len, texts))
        + len(details.diagnosis.suggestion)
        + len(details.model)
    )
