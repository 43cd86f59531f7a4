"""The store of blocks in Redis."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

from vllm_cachescope.cache.quotas import SHOWN_ORGS, Quotas
from vllm_cachescope.connectors.redis.address import Address
from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.connections import Connections
from vllm_cachescope.connectors.redis.owner_index import NoIndex, OwnerIndex
from vllm_cachescope.connectors.redis.purge_log import RedisPurgeLog
from vllm_cachescope.connectors.redis.renewal import AT_ONCE, renewals
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.connectors.redis.shared_usage import SharedUsage
from vllm_cachescope.connectors.redis.strangers import strangers
from vllm_cachescope.connectors.redis.topology import Node, Topology
from vllm_cachescope.tenancy.owner_tags import org_of
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.keyspace import HANDSHAKES, Keyspace, names_of
from vllm_cachescope.tiers.leases import LEASE_BYTES, Leases
from vllm_cachescope.tiers.store import (
    ForeignSecret,
    Misfit,
    Store,
    StoreFailed,
    StoreUnfit,
    Value,
    Written,
)

FRONT_BYTES = HEADER_BYTES + LEASE_BYTES
"""What stands in front of a payload: its header, and the lease of the entry."""

CLOCKS_APART_MS = 60_000
"""How far the clocks of engines may be apart, in ms. The server expires entries itself, so they
end in time whatever the clocks say; an entry that somebody keeps there ends so much later than its
lease."""

WINDOW_BYTES = 2 << 20
"""Bytes of values asked for ahead. The server buffers them; a few keep the wire busy."""

SCANNED = 1000
"""Names the server looks through at once when entries are purged: a millisecond's work."""

HANDSHAKE_MS = 60_000
"""How long the digest of a secret outlives the last engine that has it, in ms."""

OLDEST = (7, 0)
"""The oldest version that serves: it brought ``PEXPIRE … GT``, without which a shorter lifetime
could overwrite a longer one."""


class RedisStore(Store):
    """One thread's way to a Redis.

    Args:
        address: where it is.
        topology: shared with the tier's other threads.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        timeout_s: how long connecting to one node may take, in seconds.
        clock: the tier's clock.
        wall_clock: Unix time in seconds, in which leases end.
        quotas: what each organisation may hold; None for anything.
        server_clock: shared with the tier's other threads.
    """

    def __init__(
        self,
        address: Address,
        topology: Topology,
        keyspace: Keyspace,
        secret_digest: bytes,
        leases: Leases,
        timeout_s: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        quotas: Quotas | None,
        server_clock: ServerClock,
    ) -> None:
        self.address = address.shown
        self._connections = Connections(address, topology, timeout_s, clock)
        self._topology = topology
        self._is_cluster = address.cluster
        self._keyspace = keyspace
        self._secret_digest = secret_digest
        self._leases = leases
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._quotas = quotas
        self._usage = (
            None
            if quotas is None
            else SharedUsage(quotas, keyspace, clock, server_clock, self._connections.ask_node_of)
        )
        self._owners = OwnerIndex(keyspace, clock, server_clock, self._connections.ask_node_of)
        self._evicted: list[bytes] = []

    def alive(self) -> bool:
        return self._connections.alive()

    def connect(self, deadline: float) -> None:
        self._connections.connect(deadline)

    def greet(self, deadline: float) -> dict[str, Any]:
        self.alive()
        self.connect(deadline)
        if self._is_cluster:
            self._connections.discover(deadline)
        known: dict[str, Any] = {"used_bytes": 0, "capacity_bytes": 0}
        for node in self._topology.nodes:
            info = self._info(node, deadline)
            known["used_bytes"] += int(info.get("used_memory", 0))
            known["capacity_bytes"] += int(info.get("maxmemory", 0))
        self._shake_hands(deadline)
        self._try_to_renew(deadline)
        ask = self._connections.ask_node_of
        known["strangers"] = strangers(self._keyspace, self._secret_digest, ask, deadline)
        if self._usage is not None and self._quotas is not None:
            held = Counter(self._usage.held(deadline)).most_common(SHOWN_ORGS)
            known["orgs"] = {
                org_of(account).hex(): entries * self._quotas.entry_bytes
                for account, entries in held
            }
        return known

    def secret_digests(self, deadline: float) -> set[bytes] | None:
        self.connect(deadline)
        if self._is_cluster:
            self._connections.discover(deadline)
        for node in self._topology.nodes:
            self._info(node, deadline)
        digests: set[bytes] = set()
        # It may not let us list names, or hold too many of them.
        try:
            for node in self._topology.nodes:
                for names in self._scan(node, HANDSHAKES, deadline):
                    replies = self._connections.ask_each(
                        {name: command(b"GET", name) for name in names}, deadline
                    )
                    digests.update(reply for reply in replies.values() if isinstance(reply, bytes))
        except StoreFailed:
            return None
        return digests

    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        names = [self._keyspace.name(key) for key in keys]
        commands = {name: command(b"EXISTS", name) for name in names}
        replies = self._connections.ask_each(commands, deadline)
        return [replies[name] == 1 for name in names]

    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | Misfit | None]:
        names = [self._keyspace.name(key) for key in keys]
        nodes = [self._topology.node_of(name) for name in names]
        ahead = max(1, WINDOW_BYTES // slots[0].nbytes)
        whole = False
        try:
            for i, slot in enumerate(slots):
                latest = deadline()
                # One request ahead for each value that came in; several at the beginning.
                for j in range(0 if i == 0 else i + ahead - 1, min(i + ahead, len(keys))):
                    self._connections.channel(nodes[j], latest).send(
                        [command(b"PTTL", names[j]), command(b"GET", names[j])], latest
                    )
                yield self._value(names[i], nodes[i], slot, latest)
            whole = True
        finally:
            if not whole:
                self.close()

    def _value(
        self, name: bytes, node: Node, slot: memoryview, deadline: float
    ) -> bytes | Misfit | None:
        channel = self._connections.channel(node, deadline)
        left_ms = self._connections.settle(channel.reply(deadline), node)
        length = channel.value_length(deadline)
        if isinstance(length, Refusal) and length.code == "WRONGTYPE":
            return Misfit.TYPE
        length = cast(int | None, self._connections.settle(length, node))
        if length is None:
            return None
        if length != FRONT_BYTES + slot.nbytes:
            channel.skip(length, deadline)
            channel.end_value(deadline)
            return Misfit.LENGTH
        front = bytearray(FRONT_BYTES)
        channel.receive(memoryview(front), deadline)
        channel.receive(slot, deadline)
        channel.end_value(deadline)
        if left_ms == -1:
            return Misfit.UNLIMITED
        ends_at_ms = self._leases.end(name, bytes(front[HEADER_BYTES:]))
        if ends_at_ms is None:
            return Misfit.UNLEASED
        if ends_at_ms + CLOCKS_APART_MS <= self._wall_clock() * 1000:
            return Misfit.OVERDUE
        return bytes(front[:HEADER_BYTES])

    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        present = self.find([value.key for value in values], deadline)
        self.touch(
            [(v.key, v.expires_at) for v, there in zip(values, present, strict=True) if there],
            deadline,
        )
        absent = [i for i, there in enumerate(present) if not there]
        results = [Written.PRESENT] * len(values)
        try:
            entered = [(values[i].key, values[i].expires_at) for i in absent]
            if absent and (refusal := self._owners.enter(entered, deadline)):
                self.refusal = refusal
                return [Written.PRESENT if there else Written.REFUSED for there in present]
            sent = self._send_values(values, absent, deadline)
            for i in absent:
                results[i] = self._written(sent[i], deadline) if i in sent else Written.EXPIRED
        except StoreFailed:
            self.close()
            raise
        there = (Written.STORED, Written.PRESENT)
        self._keep_quotas(
            [(v.key, v.expires_at) for v, r in zip(values, results, strict=True) if r in there],
            deadline,
        )
        return results

    def _keep_quotas(self, stored: Sequence[tuple[bytes, float]], deadline: float) -> None:
        if self._usage is None or not stored:
            return
        # What was stored is stored; if the server does not answer now, that shows soon enough.
        with suppress(StoreFailed):
            keys = self._usage.stored(stored, deadline)
            self._unlink([self._keyspace.name(key) for key in keys], deadline)
            self._evicted += keys

    def _send_values(
        self, values: Sequence[Value], chosen: Iterable[int], deadline: float
    ) -> dict[int, Node]:
        """Send those of the chosen values that have not expired; return where each went."""
        sent: dict[int, Node] = {}
        for i in chosen:
            value = values[i]
            lifetime_ms = int((value.expires_at - self._clock()) * 1000)
            if lifetime_ms <= 0:
                continue
            name = self._keyspace.name(value.key)
            node = self._topology.node_of(name)
            before = b"*6\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b%b" % (
                len(name),
                name,
                FRONT_BYTES + value.payload.nbytes,
                value.head,
                self._lease(name, lifetime_ms),
            )
            px = b"%d" % lifetime_ms
            # Two replicas may store a block at once: the second one finds it there.
            after = b"\r\n$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(px), px)
            channel = self._connections.channel(node, deadline)
            channel.send_value(before, value.payload, after, deadline)
            sent[i] = node
        return sent

    def _written(self, node: Node, deadline: float) -> Written:
        reply = self._connections.channel(node, deadline).reply(deadline)
        if not isinstance(reply, Refusal):
            return Written.STORED if reply == b"OK" else Written.PRESENT
        if reply.code in ("READONLY", "LOADING", "CLUSTERDOWN"):
            # A primary that was demoted, or is not one yet: it has to be looked for anew.
            self._connections.abandon(str(reply))
        self._connections.is_moving(reply, node)
        self.refusal = str(reply)
        return Written.REFUSED

    def touch(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        now = self._clock()
        until = {self._keyspace.name(key): at for key, at in keys if at > now}
        left_ms = {name: int((at - now) * 1000) for name, at in until.items()}
        leases = {name: (ms, self._lease(name, ms)) for name, ms in left_ms.items()}
        commands = dict(renewals(leases, 1 if self._is_cluster else AT_ONCE))
        self._connections.ask_each(commands, deadline)
        if keys:
            self._owners.touch(keys, deadline)
        if self._usage is not None and keys:
            self._usage.touch(keys, deadline)

    def _lease(self, name: bytes, left_ms: int) -> bytes:
        return self._leases.grant(name, int(self._wall_clock() * 1000) + left_ms)

    def drop(self, keys: Sequence[bytes], deadline: float) -> int:
        names = [self._keyspace.name(key) for key in keys]
        replies = self._unlink(names, deadline)
        if self._usage is not None:
            self._usage.dropped(names, deadline)
        return _total(replies)

    def purge(self, prefix: bytes, deadline: float) -> int:
        self.connect(deadline)

        def soon() -> float:
            return min(deadline, self._clock() + self._timeout_s)

        entries = 0
        if prefix:
            with suppress(NoIndex):
                for names in self._owners.find(prefix, soon):
                    entries += self._forget(names, soon())
                if self._owners.is_whole(soon):
                    return entries
        # Everything, or what may have left the index.
        for node in self._topology.nodes:
            for names in self._scan(node, names_of(prefix), deadline):
                entries += self._forget(names, soon())
        return entries

    def _forget(self, names: Sequence[bytes], deadline: float) -> int:
        """Delete entries of whatever model; return how many there were."""
        replies = self._unlink(names, deadline)
        if None in replies:
            raise StoreFailed("entries are moving between nodes of the Cluster; try again")
        if self._usage is not None:
            self._usage.dropped(names, deadline)
        return _total(replies)

    def purge_log(self) -> RedisPurgeLog:
        return RedisPurgeLog(self._secret_digest, self._connections.ask_node_of)

    def take_evicted(self) -> list[bytes]:
        keys, self._evicted = self._evicted, []
        return keys

    def _unlink(self, names: Sequence[bytes], deadline: float) -> list[Reply]:
        """Delete entries by their names; return how many there were of each name, 0 or 1."""
        commands = {name: command(b"UNLINK", name) for name in names}
        return list(self._connections.ask_each(commands, deadline).values())

    def _scan(self, node: Node, pattern: bytes, deadline: float) -> Iterator[list[bytes]]:
        cursor = b"0"
        while True:
            soon = min(deadline, self._clock() + self._timeout_s)
            words = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % SCANNED)
            reply = self._connections.ask(node, soon, *words)
            if isinstance(reply, Refusal):
                self._connections.abandon(f"SCAN: {reply}")
            assert isinstance(reply, list)
            cursor, names = cast(tuple[bytes, list[bytes]], reply)
            if names:
                yield names
            if cursor == b"0":
                return

    def close(self) -> None:
        self._connections.close()

    def _info(self, node: Node, deadline: float) -> dict[str, str]:
        reply = self._connections.ask(node, deadline, b"INFO")
        if isinstance(reply, Refusal) and reply.code == "NOPERM":
            # A user without INFO can still store; its capacity is not known then.
            return {}
        if not isinstance(reply, bytes):
            self._connections.abandon(f"INFO: {reply}")
        lines = reply.decode(errors="replace").splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        version = info.get("redis_version", "0")
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise StoreUnfit(f"it is Redis {version}; 7.0 or newer is needed")
        return info

    def _shake_hands(self, deadline: float) -> None:
        name = self._keyspace.handshake
        node = self._topology.node_of(name)
        lifetime_ms = b"%d" % HANDSHAKE_MS
        words = (b"SET", name, self._secret_digest, b"NX", b"GET", b"PX", lifetime_ms)
        reply = self._connections.ask(node, deadline, *words)
        if isinstance(reply, Refusal) and reply.code == "OOM":
            # It is full; what it holds can still be read, and nobody can leave another digest.
            reply = self._connections.ask(node, deadline, b"GET", name)
        if isinstance(reply, Refusal):
            self._connections.abandon(str(reply))
        if reply == self._secret_digest:
            self._connections.ask(node, deadline, b"PEXPIRE", name, lifetime_ms)
        elif reply is not None:
            raise ForeignSecret(
                "another engine that serves this model uses it with another secret. Give all "
                "replicas the same secret; after a change of the secret this tier starts by "
                f"itself, {HANDSHAKE_MS // 1000} s after the last engine with the old one has gone"
            )

    def _try_to_renew(self, deadline: float) -> None:
        """Make sure that entries can live on; without a right to that they would just end early."""
        name = self._keyspace.handshake + b" of nobody"
        node = self._topology.node_of(name)
        # Neither leaves anything behind where there is no such name.
        renewal = dict(renewals({name: (1, b"")}, 1))[name]
        channel = self._connections.channel(node, deadline)
        channel.send([renewal, command(b"SETRANGE", name, b"0", b"")], deadline)
        for reply in [channel.reply(deadline) for _ in range(2)]:
            # What a full server refuses here it grants to a script.
            if isinstance(reply, Refusal) and reply.code != "OOM":
                self._connections.abandon(str(reply))


def _total(replies: Iterable[Reply]) -> int:
    return sum(reply for reply in replies if isinstance(reply, int))
