"""Shared usage: what organisations hold in a Redis, counted there, so that all engines count alike.

Each account (see `Quotas`) has a set of its entries' keys, and one more set lists the accounts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.redis.channel import Reply, command
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.connectors.redis.sorted_sets import (
    SortedSets,
    add,
    members,
    number,
    pairs,
)
from vllm_cachescope.tenancy.owner_tags import org_of
from vllm_cachescope.tiers.keyspace import Keyspace, key_in, usage_beside

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
        self._sets = SortedSets(clock, server_clock, ask_node_of, "Quotas are not kept in Redis")
        self._surveyed_at = float("-inf")

    def stored(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> list[bytes]:
        """Count entries that are in the store; return the keys of those that are too many.

        The keys that are returned are not counted any more: the caller deletes their entries. They
        are the first to expire of their organisation.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.
        """
        if (ahead_s := self._sets.ahead_s(self._keyspace.accounts, deadline)) is None:
            return []
        accounts, now_us = self._by_account(entries, ahead_s), self._sets.now_us(ahead_s)
        commands: list[bytes] = []
        for account, expires_us in accounts.items():
            name, last_us = self._keyspace.usage(account), max(expires_us.values())
            commands += [
                *add(name, expires_us),
                command(b"ZREMRANGEBYSCORE", name, b"-inf", b"%d" % now_us),
                *add(self._keyspace.accounts, {account: last_us}),
            ]
        counts = [command(b"ZCARD", self._keyspace.usage(account)) for account in accounts]
        replies = self._ask([*commands, *counts], deadline)
        evicted: list[bytes] = []
        for account, held in zip(accounts, replies[len(commands) :], strict=False):
            if over := self._quotas.over(account, number(held)):
                pop = command(b"ZPOPMIN", self._keyspace.usage(account), b"%d" % over)
                evicted += [key for key, _ in pairs(*self._ask([pop], deadline))]
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
        if (ahead_s := self._sets.ahead_s(self._keyspace.accounts, deadline)) is None:
            return
        commands: list[bytes] = []
        for account, expires_us in self._by_account(entries, ahead_s).items():
            name, last_us = self._keyspace.usage(account), max(expires_us.values())
            commands += [
                *add(name, expires_us, b"XX"),
                *add(self._keyspace.accounts, {account: last_us}, b"XX"),
            ]
        self._ask(commands, deadline)

    def dropped(self, names: Iterable[bytes], deadline: float) -> None:
        """Count entries of these names, of whatever model, no longer."""
        dropped: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for name in names:
            key = key_in(name)
            # Engines whose quotas name an unlisted organisation count it by itself.
            for account in {self._quotas.account_of(key), org_of(key)}:
                dropped[usage_beside(name, account)].append(key)
        for usage, keys in dropped.items():
            self._sets.ask(usage, [command(b"ZREM", usage, *keys)], deadline)

    def held(self, deadline: float) -> dict[bytes, int]:
        """Return how many entries each account holds."""
        if (ahead_s := self._sets.ahead_s(self._keyspace.accounts, deadline)) is None:
            return {}
        now, listed = b"%d" % self._sets.now_us(ahead_s), self._keyspace.accounts
        expired = command(b"ZREMRANGEBYSCORE", listed, b"-inf", now)
        replies = self._ask([expired, command(b"ZRANGE", listed, b"0", b"-1")], deadline)
        accounts = members(replies[1]) if replies else []
        commands: list[bytes] = []
        for account in accounts:
            name = self._keyspace.usage(account)
            commands += [
                command(b"ZREMRANGEBYSCORE", name, b"-inf", now),
                command(b"ZCARD", name),
            ]
        counts = map(number, self._ask(commands, deadline)[1::2])
        return {account: n for account, n in zip(accounts, counts, strict=False) if n}

    def _over_capacity(self, capacity: int, deadline: float) -> list[bytes]:
        """Return the keys of what all accounts together hold beyond the capacity, and count them
        no longer.

        Accounts that hold more than their reserve are evicted from first, the others only if
        that is not enough. Of the entries in question the first to expire are evicted.
        """
        held = self.held(deadline)
        evicted: list[bytes] = []
        for within_reserve in (False, True):
            over = sum(held.values()) - capacity
            candidates: list[tuple[float, bytes]] = []
            for account, count in held.items():
                spared = 0 if within_reserve else self._quotas.reserve(account)
                most = min(over, count - spared)
                if most > 0:
                    first = (b"ZRANGE", self._keyspace.usage(account), b"0", b"%d" % (most - 1))
                    found = self._ask([command(*first, b"WITHSCORES")], deadline)
                    candidates += [(at, key) for key, at in pairs(*found)]
            chosen = [key for _, key in sorted(candidates)[: max(0, over)]]
            for key in chosen:
                held[self._quotas.account_of(key)] -= 1
            self.dropped(map(self._keyspace.name, chosen), deadline)
            evicted += chosen
        return evicted

    def _by_account(
        self, entries: Iterable[tuple[bytes, float]], ahead_s: float
    ) -> dict[bytes, dict[bytes, int]]:
        """Return when entries expire, in µs of the server's time, by account and by their keys.
        Accounts that may hold any number of entries are not counted."""
        accounts: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
        for key, expires_at in entries:
            if self._quotas.counts(account := self._quotas.account_of(key)):
                accounts[account][key] = int((expires_at + ahead_s) * 1e6)
        return accounts

    def _ask(self, commands: Sequence[bytes], deadline: float) -> list[Reply]:
        return self._sets.ask(self._keyspace.accounts, commands, deadline)
