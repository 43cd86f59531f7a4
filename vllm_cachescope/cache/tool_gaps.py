"""The gaps of tool calls: how long sessions usually take until a call's results come, and which of
those that are pending are nearly over."""

from heapq import heappop, heappush
from math import exp, log

from cachetools import LRUCache

from vllm_cachescope.tenancy.owner_tags import org_of

NEARLY_OVER = 0.7
"""The share of its usual gap after which a call is nearly over."""

NEWEST_WEIGHT = 0.3
"""The weight of the newest gap in a moving average, of logarithms: gaps differ by their factors."""

MAX_KEPT = 4096
"""So many sessions and organisations are remembered, and so many calls pending at once."""

_SHORTEST_S = 0.001


class ToolGaps:
    """Learns from the calls of each session, and for its first ones from those of its organisation.

    Time is a parameter, in seconds; it never runs backwards.
    """

    def __init__(self) -> None:
        self._of_session: LRUCache[bytes, float] = LRUCache(MAX_KEPT)
        self._of_org: LRUCache[bytes, float] = LRUCache(MAX_KEPT)
        # By the nonce of the prompt whose answer has called: the session's owner, and since when.
        self._pending: dict[str, tuple[bytes, float]] = {}
        self._due: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Return how many calls are pending."""
        return len(self._pending)

    def usual_s(self, owner: bytes) -> float | None:
        """Return how long calls of a session usually take, in seconds; None if that is not known
        of its organisation either."""
        gap = self._of_session.get(owner)
        if gap is None:
            gap = self._of_org.get(org_of(owner))
        return None if gap is None else exp(gap)

    def call(self, owner: bytes, nonce: str, now: float) -> None:
        """Note that the answer to a prompt has called tools.

        Args:
            owner: the owner of its session's blocks.
            nonce: the prompt's nonce.
            now: the time.
        """
        while len(self._pending) >= MAX_KEPT:
            del self._pending[next(iter(self._pending))]
        self._pending.pop(nonce, None)
        self._pending[nonce] = owner, now
        if (usual_s := self.usual_s(owner)) is not None:
            heappush(self._due, (now + NEARLY_OVER * usual_s, nonce))
            if len(self._due) > 2 * MAX_KEPT:
                self._due = sorted(due for due in self._due if due[1] in self._pending)

    def answer(self, nonce: str, now: float) -> None:
        """Note that a request goes on from a prompt; ignored if no call of it is pending."""
        pending = self._pending.pop(nonce, None)
        if pending is None:
            return
        owner, since = pending
        gap = log(max(_SHORTEST_S, now - since))
        for known, name in ((self._of_session, owner), (self._of_org, org_of(owner))):
            average = known.get(name, gap)
            known[name] = average + NEWEST_WEIGHT * (gap - average)

    def due(self, now: float) -> list[str]:
        """Return the nonces of the prompts whose calls are nearly over by now; each only once."""
        found = []
        while self._due and self._due[0][0] <= now:
            _, nonce = heappop(self._due)
            if nonce in self._pending:
                found.append(nonce)
        return found
