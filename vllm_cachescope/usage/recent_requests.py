"""Recent requests, newest first, since a cursor: what the page asks for, wherever they are kept."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vllm_cachescope.usage.record import RequestRecord


class UnavailableError(Exception):
    """Raised where the requests are kept elsewhere, and cannot be had now."""


class Numbered(NamedTuple):
    """A record with its place in the list that it is from: of two, the later has the larger."""

    number: int
    record: RequestRecord


class RecentRequests(Protocol):
    """A list of finished requests, in the order in which they were over.

    Attributes:
        name: tells this list from all others, of another process or from before a restart:
            numbers of one say nothing in another. Letters and digits.
    """

    name: str

    def newest(
        self, org: str | None, limit: int, after: int = 0, before: int | None = None
    ) -> Sequence[Numbered]:
        """Return the newest requests, newest first.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
            after: only those with a larger number, and possibly some that have just come.
            before: only those with a smaller number; None for no bound.

        Raises:
            UnavailableError: if they cannot be had.
        """
