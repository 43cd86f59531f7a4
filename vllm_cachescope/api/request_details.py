"""The details of recent requests: why each was read as far as it was, for the page."""

from collections.abc import Iterable

from vllm_cachescope.api.break_log import Break
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account

REMEMBERED_BYTES = 24 * 2**20
"""How much memory the details take, in bytes, about: those of some 10,000 requests."""

_DETAILS_BYTES = 1500
_CHANGE_BYTES = 500

_SAME_S = 1.0
"""How far apart a record and its details say that a request was over, at most, in seconds."""


class RequestDetails:
    """Details by organisation and response, in the form in which breaks are listed, whether they
    are breaks or not. Safe for threads.

    Args:
        account_of: returns who answers for an organisation.
        limit: how much memory they may take, in bytes, about.
    """

    def __init__(self, account_of: AccountOf = own_account, limit: int = REMEMBERED_BYTES) -> None:
        self._kept: SharedMemo[str, Break] = SharedMemo(limit, _nbytes, account_of)

    def add(self, response_id: str, details: Break) -> None:
        """Keep the details of the request that was answered with ``response_id``."""
        self._kept.put(details.caller.org, response_id, details)

    def find(self, org: str | None, response_id: str, at: float) -> Break | None:
        """Return the details of a request, if they are kept.

        Args:
            org: whose; None for anyone's.
            response_id: the response's id. Clients may choose ids, and the same again.
            at: when the request was over, in seconds since the epoch.
        """
        orgs: Iterable[str] = self._kept.orgs() if org is None else (org,)
        found = (self._kept.get(one, response_id) for one in orgs)
        same = (kept for kept in found if kept is not None and abs(kept.at - at) < _SAME_S)
        return next(same, None)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the details of ``org``, or of one session of ``org``; with None, of everyone."""
        self._kept.purge(org, lambda _, kept: session in (None, kept.caller.session))


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
