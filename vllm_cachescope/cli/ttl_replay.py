"""Replays lifetimes and breakpoints over recorded traffic: which prefixes a cache would still have
had."""

import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.diagnosis.prefix_match import match_prefix
from vllm_cachescope.wire.parts import DEFAULT_TTL_S

_UNCOVERED = "not covered by a breakpoint"

_STUCK = 64
"""Of fewer tokens behind the last breakpoint nothing is said: a reminder at the end of a message,
which the next request may repeat or not."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One call and the tokens that it keeps in the cache.

    Attributes:
        fingerprint: the call's prompt.
        at: when the call was made, in seconds.
        kept: how many leading tokens of the prompt are kept for which TTL: tokens by TTL in
            seconds. ``{3600: 4000, 300: 9000}`` keeps 4,000 tokens for an hour and the next 5,000
            for five minutes.
    """

    fingerprint: Fingerprint
    at: float
    kept: Mapping[float, int]


class TtlReplay:
    """The prefixes of one session that are still cached: those that a call used within their TTL.

    As in the server's ledger, a use refreshes the whole prefix that two prompts share, and of
    several TTLs that calls gave a prefix the longest counts. What no breakpoint covers is kept on
    the device alone, as long as nothing else needs the room: it is not counted on.

    Args:
        ttl_s: TTL in seconds of everything; None for what each breakpoint asks for.
        calls: how many of the latest calls are kept.
    """

    def __init__(self, ttl_s: float | None, calls: int) -> None:
        self._ttl_s = ttl_s
        self._uses: deque[_Use] = deque(maxlen=calls)

    def use(self, placement: LineagePlacement) -> list[CacheMiss]:
        """Record a call. Return what had expired or was never covered of the tokens that it shares
        with earlier calls, in prompt order.

        Args:
            placement: where the call stands among those of its session. The call's time is in
                seconds.
        """
        now, kept = placement.node.at, self._kept(placement.node.fingerprint)
        stored = self._stored(placement)
        read = 0
        for tokens, ttl_s, at in stored:
            if now - at <= ttl_s:
                read = max(read, tokens)
                kept[ttl_s] = max(tokens, kept.get(ttl_s, 0))
        self._uses.append(_Use(placement.node.fingerprint, now, kept))
        misses: list[CacheMiss] = []
        while read < placement.shared_tokens:
            # The next token may have been stored several times: the copy that expired last counts.
            behind = [one for one in stored if one[0] > read]
            if not behind:
                tokens = placement.shared_tokens - read
                if tokens >= _STUCK:
                    misses.append(CacheMiss(MissCause.NEVER_STORED, tokens, detail=_UNCOVERED))
                break
            end, ttl_s, at = max(behind, key=lambda one: one[1] + one[2])
            age_s = round(now - at - ttl_s, 3)
            misses.append(CacheMiss(MissCause.EXPIRED, end - read, ttl_s=round(ttl_s), age_s=age_s))
            read = end
        return misses

    def _kept(self, new: Fingerprint) -> dict[float, int]:
        """Return how many tokens a call keeps by its breakpoints, as in `_Use.kept`."""
        default = new.ttl_s or DEFAULT_TTL_S
        marks: list[tuple[int, int | None]] = [
            (new.ends[mark.part], mark.ttl_s) for mark in new.marks
        ]
        if new.automatic or new.covered_tokens == new.tokens:
            # All of the prompt: two estimates of its length may differ.
            marks.append((sys.maxsize, None))
        kept: dict[float, int] = {}
        shortest = math.inf
        for tokens, ttl_s in marks:
            shortest = min(shortest, self._ttl_s or ttl_s or default)
            kept[shortest] = max(tokens, kept.get(shortest, 0))
        return kept

    def _stored(self, placement: LineagePlacement) -> list[tuple[int, float, float]]:
        """Return what earlier calls stored of the prefix that a call shares with them, as
        ``(leading tokens, TTL in seconds, time of last use)``, expired or not."""
        new, shared = placement.node.fingerprint, placement.shared_tokens
        stored: list[tuple[int, float, float]] = []
        for use in reversed(self._uses):
            common = min(match_prefix(use.fingerprint, new).tokens, shared)
            stored += [(min(tokens, common), ttl_s, use.at) for ttl_s, tokens in use.kept.items()]
            if common == shared:
                return stored  # This call refreshed what the calls before it had stored.
        if placement.ancestor is not None:
            kept = self._kept(placement.ancestor.fingerprint)
            at = placement.ancestor.at
            stored += [(min(tokens, shared), ttl_s, at) for ttl_s, tokens in kept.items()]
        return stored
