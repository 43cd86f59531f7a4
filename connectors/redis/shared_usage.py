"""Shared usage: what organisations hold in a Redis, counted there, so that all engines count alike.

Each organisation has a sorted set of its entries, by when they expire on the server's clock in µs,
and one more set lists the organisations. All of them expire with the last entry that is in them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.owner_tags import TAG_BYTES, org_of
from vllm_cachescope.tiers.keyspace import Keyspace, usage_of

logger = logger_of(__name__)

SURVEY_S = 1.0
"""How often all organisations together are held to the capacity, in seconds."""


class SharedUsage:
    """One thread's way to what organisations hold in a Redis.

    Entries that the server has evicted by itself are counted until they would have expired.

    Args:
        quotas: what each organisation may hold.
        keyspace: names of the entries, and of the sets in which they are counted.
        clock: the tier's clock.
        server_clock: shared with the tier's other threads.
        ask_node_of: sends commands to the node that has a name, and returns the answers.
    """

    def __init__(
        self,
        quotas: Quotas,
        keyspace: Keyspace,
        clock: Callable[[], float],
        server_clock: ServerClock,
        ask_node_of: Callable[[bytes, Sequence[bytes], float], list[Reply]],
    ) -> None:
        self._quotas = quotas
        self._keyspace = keyspace
        self._clock = clock
        self._server_clock = server_clock
        self._ask_node_of = ask_node_of
        self._surveyed_at = float("-inf")
        self._refusal: str | None = None

    def stored(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> list[bytes]:
        """Count entries that are in the store; return the keys of those that are too many.

        The keys that are returned are not counted any more: the caller deletes their entries. They
        are the first to expire of their organisation.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.
        """
        if (ahead_s := self._ahead_s(deadline)) is None:
            return []
        orgs, now_us = self._by_org(entries, ahead_s), self._server_us(ahead_s)
        commands: list[bytes] = []
        for org, members in orgs.items():
            name, last_us = self._keyspace.usage(org), max(members.values())
            commands += [
                command(b"ZADD", name, b"GT", *_scored(members)),
                command(b"ZREMRANGEBYSCORE", name, b"-inf", b"%d" % now_us),
                command(b"ZADD", self._keyspace.usage_orgs, b"GT", b"%d" % last_us, org),
                *(c for n in (name, self._keyspace.usage_orgs) for c in _until(n, last_us)),
            ]
        counts = [command(b"ZCARD", self._keyspace.usage(org)) for org in orgs]
        replies = self._ask([*commands, *counts], deadline)
        evicted: list[bytes] = []
        for org, held in zip(orgs, replies[len(commands) :], strict=False):
            if over := self._quotas.over(org, _number(held)):
                pop = command(b"ZPOPMIN", self._keyspace.usage(org), b"%d" % over)
                evicted += [org + member for member, _ in _pairs(*self._ask([pop], deadline))]
        if self._quotas.capacity is not None and self._clock() >= self._surveyed_at + SURVEY_S:
            self._surveyed_at = self._clock()
            evicted += self._over_capacity(self._quotas.capacity, deadline)
        return evicted

    def touch(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> None:
        """Count entries until a later time; one that is not counted is ignored.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.
        """
        if (ahead_s := self._ahead_s(deadline)) is None:
            return
        commands: list[bytes] = []
        for org, members in self._by_org(entries, ahead_s).items():
            name, last_us = self._keyspace.usage(org), max(members.values())
            commands += [
                command(b"ZADD", name, b"XX", b"GT", *_scored(members)),
                command(b"ZADD", self._keyspace.usage_orgs, b"XX", b"GT", b"%d" % last_us, org),
                *(c for n in (name, self._keyspace.usage_orgs) for c in _until(n, last_us)),
            ]
        self._ask(commands, deadline)

    def dropped(self, names: Iterable[bytes], deadline: float) -> None:
        """Count entries of these names, of whatever model, no longer."""
        members: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for name in names:
            usage, member = usage_of(name)
            members[usage].append(member)
        for usage, dropped in members.items():
            self._ask([command(b"ZREM", usage, *dropped)], deadline, usage)

    def held(self, deadline: float) -> dict[bytes, int]:
        """Return how many entries each organisation holds, by its tag."""
        if (ahead_s := self._ahead_s(deadline)) is None:
            return {}
        now, listed = b"%d" % self._server_us(ahead_s), self._keyspace.usage_orgs
        expired = command(b"ZREMRANGEBYSCORE", listed, b"-inf", now)
        replies = self._ask([expired, command(b"ZRANGE", listed, b"0", b"-1")], deadline)
        found = replies[1] if replies and isinstance(replies[1], list) else []
        orgs = [org for org in found if isinstance(org, bytes)]
        commands: list[bytes] = []
        for org in orgs:
            name = self._keyspace.usage(org)
            commands += [
                command(b"ZREMRANGEBYSCORE", name, b"-inf", now),
                command(b"ZCARD", name),
            ]
        counts = map(_number, self._ask(commands, deadline)[1::2])
        return {org: count for org, count in zip(orgs, counts, strict=False) if count}

    def _over_capacity(self, capacity: int, deadline: float) -> list[bytes]:
        """Return the keys of what all organisations together hold beyond the capacity, and count
        them no longer.

        Organisations that hold more than their reserve are evicted from first, the others only if
        that is not enough. Of the entries in question the first to expire are evicted.
        """
        held = self.held(deadline)
        evicted: list[bytes] = []
        for within_reserve in (False, True):
            over = sum(held.values()) - capacity
            candidates: list[tuple[float, bytes]] = []
            for org, count in held.items():
                most = min(over, count if within_reserve else count - self._quotas.reserve(org))
                if most > 0:
                    first = (b"ZRANGE", self._keyspace.usage(org), b"0", b"%d" % (most - 1))
                    found = self._ask([command(*first, b"WITHSCORES")], deadline)
                    candidates += [(at, org + member) for member, at in _pairs(*found)]
            chosen = [key for _, key in sorted(candidates)[: max(0, over)]]
            for key in chosen:
                held[org_of(key)] -= 1
            self.dropped(map(self._keyspace.name, chosen), deadline)
            evicted += chosen
        return evicted

    def _by_org(
        self, entries: Iterable[tuple[bytes, float]], ahead_s: float
    ) -> dict[bytes, dict[bytes, int]]:
        """Return when entries expire, in µs of the server's time, by organisation and by the rest
        of their keys. Organisations that may hold any number of entries are not counted."""
        orgs: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
        for key, expires_at in entries:
            if self._quotas.counts(org := org_of(key)):
                orgs[org][key[TAG_BYTES:]] = int((expires_at + ahead_s) * 1e6)
        return orgs

    def _ahead_s(self, deadline: float) -> float | None:
        """Return how far the server's clock is ahead of ours, in seconds; None if it does not
        tell."""
        asked = self._clock()
        if self._server_clock.is_due(asked):
            (reply,) = self._ask([command(b"TIME")], deadline) or (None,)
            if isinstance(reply, list):
                seconds, micros = map(_number, reply)
                self._server_clock.learn(seconds + micros / 1e6, asked, self._clock())
        return self._server_clock.ahead_s

    def _server_us(self, ahead_s: float) -> int:
        return int((self._clock() + ahead_s) * 1e6)

    def _ask(
        self, commands: Sequence[bytes], deadline: float, name: bytes | None = None
    ) -> list[Reply]:
        """Return a node's answers to commands; none if it refuses one of them, as it does where
        the user has no right to them.

        Args:
            commands: what `command` made.
            deadline: until when the answers are waited for.
            name: a name that the node has, by default that of the set of organisations.
        """
        if not commands:
            return []
        replies = self._ask_node_of(name or self._keyspace.usage_orgs, commands, deadline)
        refusal = next((str(reply) for reply in replies if isinstance(reply, Refusal)), None)
        if refusal is not None and refusal != self._refusal:
            logger.warning("Quotas are not kept in Redis: %s", refusal)
        self._refusal = refusal
        return [] if refusal is not None else replies


def _scored(members: dict[bytes, int]) -> Iterator[bytes]:
    for member, expires_us in members.items():
        yield b"%d" % expires_us
        yield member


def _until(name: bytes, last_us: int) -> Iterator[bytes]:
    # What has no expiry yet counts as longer than any for GT.
    for condition in (b"NX", b"GT"):
        yield command(b"PEXPIREAT", name, b"%d" % (last_us // 1000 + 1), condition)


def _pairs(reply: Reply = None) -> Iterator[tuple[bytes, float]]:
    """Yield members of a sorted set with their scores."""
    flat = reply if isinstance(reply, list) else []
    for member, score in zip(flat[::2], flat[1::2], strict=True):
        assert isinstance(member, bytes) and isinstance(score, bytes)
        yield member, float(score)


def _number(reply: Reply) -> int:
    return int(reply) if isinstance(reply, int | bytes) else 0
