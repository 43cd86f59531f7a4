"""What organisations hold in a Redis, counted there, so that all engines count alike.

Each organisation has a sorted set of its entries, by when they expire on the server's clock in µs,
and one more set lists the organisations. All of them expire with the last entry that is in them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.owner_tags import TAG_BYTES, org_of
from vllm_cachescope.tiers.keyspace import Keyspace, account_of

logger = logger_of(__name__)

CLOCK_S = 20.0
"""How long the server's time is reckoned by our clock after it was asked, in seconds."""

SURVEY_S = 1.0
"""How often all organisations together are held to the capacity, in seconds."""


class ServerClock:
    """The server's clock as reckoned by ours. A tier's threads share one: were each to reckon by
    itself, what one writes would not be in order with what another does.

    Attributes:
        ahead_s: how far it is ahead of ours, in seconds; None until it was asked.
    """

    def __init__(self) -> None:
        self.ahead_s: float | None = None
        self._asked_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether the server should be asked for its time."""
        return now >= self._asked_at + CLOCK_S

    def learn(self, server_s: float, asked: float, answered: float) -> None:
        """Take the server's answer.

        It was given between question and answer. A reckoning that agrees with that stays as it
        is, for the order of what was written by it; else the middle is taken.

        Args:
            server_s: the server's time, in seconds.
            asked, answered: our times before the question and after the answer, in seconds.
        """
        self._asked_at = answered
        least, most = server_s - answered, server_s - asked
        if self.ahead_s is None or not least <= self.ahead_s <= most:
            self.ahead_s = (least + most) / 2


class Accounts:
    """One thread's way to the accounts.

    Entries that the server has evicted by itself are counted until they would have expired.

    Args:
        shares: what each organisation may have.
        keyspace: names of the entries and of the accounts.
        clock: the tier's clock.
        server_clock: shared with the tier's other threads.
        converse: sends commands to the node that has a name, and returns the answers.
    """

    def __init__(
        self,
        shares: Quotas,
        keyspace: Keyspace,
        clock: Callable[[], float],
        server_clock: ServerClock,
        converse: Callable[[bytes, Sequence[bytes], float], list[Reply]],
    ) -> None:
        self._shares = shares
        self._keyspace = keyspace
        self._clock = clock
        self._server_clock = server_clock
        self._send = converse
        self._surveyed_at = float("-inf")
        self._refusal: str | None = None

    def stored(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> list[bytes]:
        """Count entries that are in the store; return the keys of those that must go, which are
        counted no longer.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.
        """
        if (ahead_s := self._ahead_s(deadline)) is None:
            return []
        orgs, now_us = self._by_org(entries, ahead_s), self._server_us(ahead_s)
        commands: list[bytes] = []
        for org, members in orgs.items():
            name, last_us = self._keyspace.account(org), max(members.values())
            commands += [
                command(b"ZADD", name, b"GT", *_scored(members)),
                command(b"ZREMRANGEBYSCORE", name, b"-inf", b"%d" % now_us),
                command(b"ZADD", self._keyspace.accounts, b"GT", b"%d" % last_us, org),
                *(c for n in (name, self._keyspace.accounts) for c in _until(n, last_us)),
            ]
        counts = [command(b"ZCARD", self._keyspace.account(org)) for org in orgs]
        replies = self._converse([*commands, *counts], deadline)
        gone: list[bytes] = []
        for org, held in zip(orgs, replies[len(commands) :], strict=False):
            if over := self._shares.over(org, _number(held)):
                pop = command(b"ZPOPMIN", self._keyspace.account(org), b"%d" % over)
                gone += [org + member for member, _ in _pairs(*self._converse([pop], deadline))]
        if self._shares.capacity is not None and self._clock() >= self._surveyed_at + SURVEY_S:
            self._surveyed_at = self._clock()
            gone += self._over_capacity(self._shares.capacity, deadline)
        return gone

    def used(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> None:
        """Note that entries expire later than before; those that are not counted are ignored."""
        if (ahead_s := self._ahead_s(deadline)) is None:
            return
        commands: list[bytes] = []
        for org, members in self._by_org(entries, ahead_s).items():
            name, last_us = self._keyspace.account(org), max(members.values())
            commands += [
                command(b"ZADD", name, b"XX", b"GT", *_scored(members)),
                command(b"ZADD", self._keyspace.accounts, b"XX", b"GT", b"%d" % last_us, org),
                *(c for n in (name, self._keyspace.accounts) for c in _until(n, last_us)),
            ]
        self._converse(commands, deadline)

    def deleted(self, names: Iterable[bytes], deadline: float) -> None:
        """Note that entries of these names, of whatever model, are gone."""
        members: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for name in names:
            account, member = account_of(name)
            members[account].append(member)
        for account, gone in members.items():
            self._converse([command(b"ZREM", account, *gone)], deadline, account)

    def held(self, deadline: float) -> dict[bytes, int]:
        """Return how many entries each organisation holds, by its tag."""
        if (ahead_s := self._ahead_s(deadline)) is None:
            return {}
        now, accounts = b"%d" % self._server_us(ahead_s), self._keyspace.accounts
        expired = command(b"ZREMRANGEBYSCORE", accounts, b"-inf", now)
        replies = self._converse([expired, command(b"ZRANGE", accounts, b"0", b"-1")], deadline)
        orgs = replies[1] if replies and isinstance(replies[1], list) else []
        commands: list[bytes] = []
        for org in orgs:
            assert isinstance(org, bytes)
            name = self._keyspace.account(org)
            commands += [
                command(b"ZREMRANGEBYSCORE", name, b"-inf", now),
                command(b"ZCARD", name),
            ]
        counts = map(_number, self._converse(commands, deadline)[1::2])
        return {org: count for org, count in zip(orgs, counts, strict=False) if count}

    def _over_capacity(self, capacity: int, deadline: float) -> list[bytes]:
        """Return the keys of what organisations hold too much together: the first to expire of
        those that hold more than their reserve, and of the others if that is not enough."""
        held = self.held(deadline)
        gone: list[bytes] = []
        for spared in (False, True):
            over = sum(held.values()) - capacity
            candidates: list[tuple[float, bytes]] = []
            for org, count in held.items():
                most = min(over, count if spared else count - self._shares.reserve(org))
                if most > 0:
                    first = (b"ZRANGE", self._keyspace.account(org), b"0", b"%d" % (most - 1))
                    found = self._converse([command(*first, b"WITHSCORES")], deadline)
                    candidates += [(at, org + member) for member, at in _pairs(*found)]
            chosen = [key for _, key in sorted(candidates)[: max(0, over)]]
            for key in chosen:
                held[org_of(key)] -= 1
            self.deleted(map(self._keyspace.name, chosen), deadline)
            gone += chosen
        return gone

    def _by_org(
        self, entries: Iterable[tuple[bytes, float]], ahead_s: float
    ) -> dict[bytes, dict[bytes, int]]:
        """Return when entries expire, in µs of the server's time, by organisation and by what
        else their keys hold; those of organisations that may hold anything are left out."""
        orgs: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
        for key, until in entries:
            if self._shares.counts(org := org_of(key)):
                orgs[org][key[TAG_BYTES:]] = int((until + ahead_s) * 1e6)
        return orgs

    def _ahead_s(self, deadline: float) -> float | None:
        """Return how far the server's clock is ahead of ours, in seconds; None if it does not
        tell."""
        asked = self._clock()
        if self._server_clock.is_due(asked):
            (reply,) = self._converse([command(b"TIME")], deadline) or (None,)
            if isinstance(reply, list):
                seconds, micros = map(_number, reply)
                self._server_clock.learn(seconds + micros / 1e6, asked, self._clock())
        return self._server_clock.ahead_s

    def _server_us(self, ahead_s: float) -> int:
        return int((self._clock() + ahead_s) * 1e6)

    def _converse(
        self, commands: Sequence[bytes], deadline: float, name: bytes | None = None
    ) -> list[Reply]:
        """Return the answers to commands to the node that has ``name``, by default the accounts;
        none if it refuses one of them, as a user without the right."""
        if not commands:
            return []
        replies = self._send(name or self._keyspace.accounts, commands, deadline)
        refusal = next((str(reply) for reply in replies if isinstance(reply, Refusal)), None)
        if refusal is not None and refusal != self._refusal:
            logger.warning("Quotas are not kept in Redis: %s", refusal)
        self._refusal = refusal
        return [] if refusal is not None else replies


def _scored(members: dict[bytes, int]) -> Iterator[bytes]:
    for member, until_us in members.items():
        yield b"%d" % until_us
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
