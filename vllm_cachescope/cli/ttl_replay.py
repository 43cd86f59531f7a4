"""Which prefixes of recorded traffic a cache would still have had: those used recently enough."""

import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.diagnosis.prefix_match import match_prefix


@dataclass(frozen=True, slots=True)
class _Use:
    """A call as far as it keeps something in the cache.

    Attributes:
        fingerprint: its prompt.
        at: when it was made, in seconds.
        kept: how many of its leading tokens it keeps for each lifetime, in seconds.
    """

    fingerprint: Fingerprint
    at: float
    kept: Mapping[float, int]


class TtlReplay:
    """Which prefixes of a session are still cached: those that any call used recently enough.

    As in the ledger of the server, a use refreshes all that two prompts share, and the longest
    lifetime counts that any call gave it.

    Args:
        ttl_s: the lifetime in seconds of what names none.
        calls: how many of the latest calls are remembered.
    """

    def __init__(self, ttl_s: float, calls: int) -> None:
        self._ttl_s = ttl_s
        self._uses: deque[_Use] = deque(maxlen=calls)

    def use(self, placement: LineagePlacement) -> list[CacheMiss]:
        """Note a call and return what of its shared tokens had expired, in prompt order."""
        now, kept = placement.node.at, self._asked(placement.node.fingerprint)
        left = self._left(placement)
        read = 0
        for tokens, ttl_s, at in left:
            if now - at <= ttl_s:
                read = max(read, tokens)
                kept[ttl_s] = max(tokens, kept.get(ttl_s, 0))
        self._uses.append(_Use(placement.node.fingerprint, now, kept))
        misses: list[CacheMiss] = []
        while read < placement.shared_tokens:
            # Of several lifetimes that the next token had, the one that ended last was its end.
            behind = [one for one in left if one[0] > read]
            end, ttl_s, at = max(behind, key=lambda one: one[1] + one[2])
            age_s = round(now - at - ttl_s, 3)
            misses.append(CacheMiss(MissCause.EXPIRED, end - read, ttl_s=round(ttl_s), age_s=age_s))
            read = end
        return misses

    def _asked(self, new: Fingerprint) -> dict[float, int]:
        """Return how many leading tokens are to be kept for how long, by what the client asked."""
        default = new.ttl_s or self._ttl_s
        kept: dict[float, int] = {}
        shortest = math.inf
        # Past the last breakpoint, everything: estimates do not agree on where a prompt ends.
        marks = [(new.ends[mark.part], mark.ttl_s) for mark in new.marks]
        for tokens, ttl_s in (*marks, (sys.maxsize, None)):
            shortest = min(shortest, ttl_s or default)
            kept[shortest] = tokens
        return kept

    def _left(self, placement: LineagePlacement) -> list[tuple[int, float, float]]:
        """Return what earlier calls left of what a call shares: tokens, lifetime, last use."""
        new, shared = placement.node.fingerprint, placement.shared_tokens
        left: list[tuple[int, float, float]] = []
        for use in reversed(self._uses):
            common = min(match_prefix(use.fingerprint, new).tokens, shared)
            left += [(min(tokens, common), ttl_s, use.at) for ttl_s, tokens in use.kept.items()]
            if common == shared:
                return left  # It refreshed what those before it had left.
        if placement.ancestor is not None:
            left.append((shared, self._ttl_s, placement.ancestor.at))
        return left
