"""The latest prompts of sessions: which blocks only one conversation of a session has used."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm_cachescope.tenancy.owner_tags import TAG_BYTES

MAX_PROMPTS = 64
"""So many prompts of a session are kept that no other goes on from."""

MAX_IN_ALL = 65_536
"""So many prompts are kept of all sessions; some 500 bytes each beside the keys."""


class _Kept(NamedTuple):
    """A prompt: its blocks, and how many of them were not generated."""

    keys: Sequence[bytes]
    own: int

    def shared(self, other: "_Kept") -> int:
        """Return how many leading blocks both have."""
        mine, others = self.keys, other.keys
        places = range(min(len(mine), len(others)))
        return bisect_left(places, True, key=lambda at: mine[at] != others[at])


class SessionPrompts:
    """The blocks of each conversation's latest prompt, by session.

    A prompt that another of its session goes on from is dropped: the other one has its blocks.
    Prompts without a session are not kept: who else uses what they use cannot be told.

    A block's key stands for all in front of it as well: two prompts that have the same key at one
    place are the same up to there.

    Args:
        max_keys: how many keys are kept at most, over all prompts: 8 bytes each, beside the key
            itself, which other tables have. The session used least recently goes first.
    """

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._keys = 0
        self._sessions: OrderedDict[bytes, dict[str, _Kept]] = OrderedDict()
        self._owner_of: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._owner_of)

    @property
    def keys(self) -> int:
        """How many keys are kept."""
        return self._keys

    def add(self, owner: bytes, nonce: str, keys: Sequence[bytes], own: int) -> None:
        """Keep a prompt that is over.

        Args:
            owner: the owner of blocks of its session; see `owner_tags`.
            nonce: the prompt's nonce.
            keys: its blocks, from the first one on. Not copied.
            own: how many blocks the prompt had without what was generated. A request that was cut
                off has computed fewer.
        """
        if not nonce or not keys or len(keys) > self._max_keys or not any(owner[TAG_BYTES:]):
            return
        self._drop(nonce)
        for begun in self.begun_by(owner, lambda at: keys[at] if at < len(keys) else None):
            self._drop(begun)
        prompts = self._sessions.setdefault(owner, {})
        self._sessions.move_to_end(owner)
        prompts[nonce] = _Kept(keys, min(own, len(keys)))
        self._owner_of[nonce] = owner
        self._keys += len(keys)
        if len(prompts) > MAX_PROMPTS:
            self._drop(next(iter(prompts)))
        while self._keys > self._max_keys or len(self) > MAX_IN_ALL:
            self._drop(next(iter(self._sessions[next(iter(self._sessions))])))

    def owner_of(self, nonce: str) -> bytes | None:
        """Return the owner of the blocks of a prompt's session; None if the prompt is not kept."""
        return self._owner_of.get(nonce)

    def keys_of(self, nonce: str) -> Sequence[bytes] | None:
        """Return the blocks of a prompt that are not generated; None if it is not kept."""
        if (owner := self._owner_of.get(nonce)) is None:
            return None
        kept = self._sessions[owner][nonce]
        return kept.keys[: kept.own]

    def begun_by(self, owner: bytes, key_at: Callable[[int], bytes | None]) -> list[str]:
        """Return the nonces of the prompts that a new one of their session goes on from. What they
        generated may differ: templates render some answers otherwise in the next prompt.

        Args:
            owner: the owner of the session's blocks.
            key_at: returns the new prompt's block at a place from 0; None behind its end.
        """
        return [
            nonce
            for nonce, kept in self._sessions.get(owner, {}).items()
            if kept.own and key_at(kept.own - 1) == kept.keys[kept.own - 1]
        ]

    def end(self, nonce: str) -> tuple[bytes, Sequence[bytes]]:
        """Drop a prompt that nothing goes on from; return the owner of its session's blocks, and
        its blocks behind those that other prompts of the session have. ``(b"", ())`` if it is not
        known, as when another has gone on from it."""
        owner = self._owner_of.get(nonce)
        if owner is None:
            return b"", ()
        ended = self._sessions[owner][nonce]
        self._drop(nonce)
        others = self._sessions.get(owner, {}).values()
        shared = max((ended.shared(other) for other in others), default=0)
        return owner, ended.keys[shared:]

    def end_session(self, owner: bytes) -> list[bytes]:
        """Drop all prompts of a session that is over; return their blocks."""
        prompts = self._sessions.get(owner, {})
        found = dict.fromkeys(key for kept in prompts.values() for key in kept.keys)
        for nonce in list(prompts):
            self._drop(nonce)
        return list(found)

    def purge(self, prefix: bytes) -> None:
        """Drop the prompts of all sessions whose owner begins with ``prefix``."""
        for owner in [owner for owner in self._sessions if owner.startswith(prefix)]:
            self.end_session(owner)

    def _drop(self, nonce: str) -> None:
        owner = self._owner_of.pop(nonce, None)
        if owner is None:
            return
        prompts = self._sessions[owner]
        self._keys -= len(prompts.pop(nonce).keys)
        if not prompts:
            del self._sessions[owner]
