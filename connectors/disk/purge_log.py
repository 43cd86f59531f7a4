"""The purge log of a disk tier: notices and followers in the index, for engines of one machine.

Positions are the machine's time in µs. Where its clock is set back they go on from the last one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from vllm_cachescope.connectors.disk.index import Index
from vllm_cachescope.tiers.purge_log import (
    AT_ONCE,
    MAX_ENTRIES,
    RETENTION_S,
    Follower,
    News,
    PurgeLog,
)

GONE_S = 3600
"""How long a follower that is not heard of any more stays listed, in seconds."""

RENEW_S = 2.0
"""After how many seconds it is written down that a follower is heard of still."""


class DiskPurgeLog(PurgeLog):
    """One thread's way to the log of all engines with one secret.

    Args:
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        open_index: has the index to use until a deadline.
        wall_clock: Unix time in seconds.
    """

    def __init__(
        self,
        secret_digest: bytes,
        open_index: Callable[[float], AbstractContextManager[Index]],
        wall_clock: Callable[[], float],
    ) -> None:
        self._secret = secret_digest
        self._open_index = open_index
        self._wall_clock = wall_clock

    def announce(self, entry: bytes, deadline: float) -> int:
        with self._open_index(deadline) as index, index.transaction():
            known = index.run(
                "SELECT position FROM notices WHERE secret = ? AND entry = ?", self._secret, entry
            )
            if known:
                return int(known[0][0])
            position = self._now_us(index, ahead=1)
            index.run("INSERT INTO notices VALUES (?, ?, ?)", self._secret, position, entry)
            index.run(
                "DELETE FROM notices WHERE secret = ? AND position <= ?",
                self._secret,
                position - RETENTION_S * 1_000_000,
            )
            self._cut(index)
            return position

    def _cut(self, index: Index) -> None:
        """Delete what the log has too much of, and note up to where it is not whole any more."""
        cut = index.run(
            "SELECT position FROM notices WHERE secret = ? ORDER BY position DESC LIMIT 1 OFFSET ?",
            self._secret,
            MAX_ENTRIES,
        )
        if cut:
            index.run("INSERT OR REPLACE INTO cuts VALUES (?, ?)", self._secret, *cut[0])
            index.run(
                "DELETE FROM notices WHERE secret = ? AND position <= ?", self._secret, *cut[0]
            )

    def follow(self, follower_id: bytes, claim: bytes, since: int, deadline: float) -> News:
        with self._open_index(deadline) as index:
            found = index.run(
                "SELECT claim, heard_us FROM followers WHERE secret = ? AND follower = ?",
                self._secret,
                follower_id,
            )
            now = self._now_us(index)
            if not found or found[0][0] != claim or abs(now - found[0][1]) > RENEW_S * 1e6:
                values = self._secret, follower_id, claim, now
                index.run("INSERT OR REPLACE INTO followers VALUES (?, ?, ?, ?)", *values)
            cut = index.run("SELECT position FROM cuts WHERE secret = ?", self._secret)
            news = index.run(
                "SELECT position, entry FROM notices WHERE secret = ? AND position > ? "
                "ORDER BY position LIMIT ?",
                self._secret,
                since,
                AT_ONCE,
            )
        complete_from = max(cut[0][0] if cut else 0, now - RETENTION_S * 1_000_000)
        return News(now, complete_from, not found, [(at, bytes(entry)) for at, entry in news])

    def followers(self, deadline: float) -> list[Follower]:
        with self._open_index(deadline) as index:
            now = self._now_us(index)
            rows = index.run(
                "SELECT follower, claim, heard_us FROM followers WHERE secret = ?", self._secret
            )
            found = [
                Follower(bytes(follower), bytes(claim), max(0.0, (now - heard_us) / 1e6))
                for follower, claim, heard_us in rows
            ]
            if any(one.idle_s > GONE_S for one in found):
                index.run(
                    "DELETE FROM followers WHERE secret = ? AND heard_us < ?",
                    self._secret,
                    now - GONE_S * 1_000_000,
                )
        return found

    def _now_us(self, index: Index, ahead: int = 0) -> int:
        """Return the position of the present, ``ahead`` behind the last notice at least."""
        last = index.run("SELECT max(position) FROM notices WHERE secret = ?", self._secret)
        return max(int(self._wall_clock() * 1e6), (last[0][0] or 0) + ahead)
