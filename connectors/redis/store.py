"""Blocks in Redis."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from redis.crc import key_slot
from redis.exceptions import RedisError

from vllm_cachescope.cache.quotas import SHOWN_ORGS, Quotas
from vllm_cachescope.connectors.redis.accounts import Accounts, ServerClock
from vllm_cachescope.connectors.redis.address import Address
from vllm_cachescope.connectors.redis.channel import Channel, Refusal, Reply, command
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.keyspace import Keyspace, names_of
from vllm_cachescope.tiers.store import (
    ForeignSecret,
    Store,
    StoreFailed,
    StoreUnfit,
    Value,
    Written,
)

logger = logger_of(__name__)

WINDOW_BYTES = 2 << 20
"""Values asked for ahead. The server buffers them; a little keeps the wire busy."""

SCANNED = 1000
"""Names the server looks through at once when entries are purged: a millisecond's work."""

MARK_MS = 60_000
"""How long the mark of a secret outlives the last engine that has it, in ms."""

OLDEST = (7, 0)
"""``PEXPIRE … GT``, without which a shorter lifetime could overwrite a longer one, came then."""

Node = tuple[str, int] | None
"""A Cluster node; None for the one server."""


class Topology:
    """Which Cluster node has which keys; shared by the threads of a tier."""

    def __init__(self, address: Address) -> None:
        self._seeds = address.hosts
        self._cluster = address.cluster
        self._lock = threading.Lock()
        self._slots: dict[int, Node] = {}

    @property
    def known(self) -> bool:
        """Whether there is nothing to find out."""
        return not self._cluster or bool(self._slots)

    @property
    def nodes(self) -> list[Node]:
        """The primaries that are known; of a Cluster that is not, the nodes its URL names."""
        with self._lock:
            known = list(dict.fromkeys(self._slots.values()))
        return known or (list(self._seeds) if self._cluster else [None])

    def node_of(self, name: bytes) -> Node:
        """Return where ``name`` is."""
        return self._slots.get(key_slot(name), self._seeds[0]) if self._cluster else None

    def learn(self, ranges: Iterable[Any], asked: Node) -> None:
        """Take the answer of ``CLUSTER SLOTS``, which the node ``asked`` gave."""
        slots: dict[int, Node] = {}
        for first, last, (host, port, *_), *_ in ranges:
            # No host means the one that was asked.
            name = host.decode() if host else asked[0] if asked else ""
            slots.update(dict.fromkeys(range(first, last + 1), (name, port)))
        with self._lock:
            self._slots = slots

    def moved(self, refusal: Refusal, asked: Node) -> None:
        """Take a ``MOVED slot host:port``."""
        _, slot, where = refusal.split(" ")[:3]
        host, _, port = where.rpartition(":")
        with self._lock:
            self._slots[int(slot)] = (host or (asked[0] if asked else ""), int(port))

    def unsettle(self) -> None:
        """Forget what is known: a node has gone."""
        with self._lock:
            self._slots = {}


class RedisStore(Store):
    """One thread's way to a Redis.

    Args:
        address: where it is.
        topology: shared with the tier's other threads.
        keyspace: names of the entries.
        mark: tells our secret from others; see `keyspace.secret_mark`.
        timeout_s: how long connecting to one node may take, in seconds.
        clock: the tier's clock.
        shares: what each organisation may have; None for anything.
        server_clock: shared with the tier's other threads.
    """

    def __init__(
        self,
        address: Address,
        topology: Topology,
        keyspace: Keyspace,
        mark: bytes,
        timeout_s: float,
        clock: Callable[[], float],
        shares: Quotas | None,
        server_clock: ServerClock,
    ) -> None:
        self.address = address.shown
        self._address = address
        self._topology = topology
        self._keyspace = keyspace
        self._mark = mark
        self._timeout_s = timeout_s
        self._clock = clock
        self._channels: dict[Node, Channel] = {}
        self._shares = shares
        self._accounts = (
            None
            if shares is None
            else Accounts(shares, keyspace, clock, server_clock, self._converse)
        )
        self._given_up: list[bytes] = []

    def alive(self) -> bool:
        for node, channel in list(self._channels.items()):
            if not channel.alive:
                channel.close()
                del self._channels[node]
        return all(node in self._channels for node in self._topology.nodes)

    def connect(self, deadline: float) -> None:
        if not self._topology.known:
            self._discover(deadline)
        for node in self._topology.nodes:
            self._channel(node, deadline)

    def greet(self, deadline: float) -> dict[str, Any]:
        self.alive()
        self.connect(deadline)
        if self._address.cluster:
            self._discover(deadline)
        known: dict[str, Any] = {"used_bytes": 0, "capacity_bytes": 0}
        for node in self._topology.nodes:
            info = self._info(node, deadline)
            known["used_bytes"] += int(info.get("used_memory", 0))
            known["capacity_bytes"] += int(info.get("maxmemory", 0))
        self._shake_hands(deadline)
        if self._accounts is not None and self._shares is not None:
            held = Counter(self._accounts.held(deadline)).most_common(SHOWN_ORGS)
            known["orgs"] = {org.hex(): count * self._shares.entry_bytes for org, count in held}
        return known

    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        names = [self._keyspace.name(key) for key in keys]
        replies = self._each({name: command(b"EXISTS", name) for name in names}, deadline)
        return [replies[name] == 1 for name in names]

    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | None]:
        names = [self._keyspace.name(key) for key in keys]
        nodes = [self._topology.node_of(name) for name in names]
        ahead = max(1, WINDOW_BYTES // slots[0].nbytes)
        whole = False
        try:
            for i, slot in enumerate(slots):
                latest = deadline()
                # One request ahead for each value that came in; several at the beginning.
                for j in range(0 if i == 0 else i + ahead - 1, min(i + ahead, len(keys))):
                    self._channel(nodes[j], latest).send(
                        [command(b"PTTL", names[j]), command(b"GET", names[j])], latest
                    )
                yield self._value(nodes[i], slot, latest)
            whole = True
        finally:
            if not whole:
                self.close()

    def _value(self, node: Node, slot: memoryview, deadline: float) -> bytes | None:
        channel = self._channels[node]
        left_ms = self._settle(channel.reply(deadline), node)
        length = self._settle(channel.value_length(deadline), node)
        if length is None:
            return None
        assert isinstance(length, int)
        if length != HEADER_BYTES + slot.nbytes:
            channel.skip(length, deadline)
            head = b""
        else:
            found = bytearray(HEADER_BYTES)
            channel.receive(memoryview(found), deadline)
            channel.receive(slot, deadline)
            head = bytes(found)
        channel.end_value(deadline)
        # Ours always expire. One that does not was tampered with and would stay for ever.
        return b"" if left_ms == -1 else head

    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        present = self.find([value.key for value in values], deadline)
        self.refresh(
            [(v.key, v.expires_at) for v, there in zip(values, present, strict=True) if there],
            deadline,
        )
        absent = [i for i, there in enumerate(present) if not there]
        results = [Written.PRESENT] * len(values)
        try:
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
        if self._accounts is None or not stored:
            return
        # What was stored is stored; if the server does not answer now, that shows soon enough.
        with suppress(StoreFailed):
            keys = self._accounts.stored(stored, deadline)
            names = [self._keyspace.name(key) for key in keys]
            self._each({name: command(b"UNLINK", name) for name in names}, deadline)
            self._given_up += keys

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
            before = b"*6\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (
                len(name),
                name,
                len(value.head) + value.payload.nbytes,
                value.head,
            )
            px = b"%d" % lifetime_ms
            # Two replicas may store a block at once: the second one finds it there.
            after = b"\r\n$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(px), px)
            self._channel(node, deadline).send_value(before, value.payload, after, deadline)
            sent[i] = node
        return sent

    def _written(self, node: Node, deadline: float) -> Written:
        reply = self._channels[node].reply(deadline)
        if not isinstance(reply, Refusal):
            return Written.STORED if reply == b"OK" else Written.PRESENT
        if reply.code in ("READONLY", "LOADING", "CLUSTERDOWN"):
            # A primary that was demoted, or is not one yet: it has to be looked for anew.
            self._abandon(str(reply))
        self._note(reply, node)
        self.refusal = str(reply)
        return Written.REFUSED

    def refresh(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        now = self._clock()
        left_ms = {
            self._keyspace.name(key): b"%d" % int((until - now) * 1000)
            for key, until in keys
            if until > now
        }
        commands = {name: command(b"PEXPIRE", name, ms, b"GT") for name, ms in left_ms.items()}
        self._each(commands, deadline)
        if self._accounts is not None and keys:
            self._accounts.used(keys, deadline)

    def delete(self, keys: Sequence[bytes], deadline: float) -> int:
        names = [self._keyspace.name(key) for key in keys]
        replies = self._each({name: command(b"UNLINK", name) for name in names}, deadline)
        if self._accounts is not None:
            self._accounts.deleted(names, deadline)
        return sum(reply for reply in replies.values() if isinstance(reply, int))

    def purge(self, prefix: bytes, deadline: float) -> int:
        self.connect(deadline)
        entries = 0
        for node in self._topology.nodes:
            for names in self._scan(node, names_of(prefix), deadline):
                soon = min(deadline, self._clock() + self._timeout_s)
                replies = self._each({name: command(b"UNLINK", name) for name in names}, soon)
                if None in replies.values():
                    raise StoreFailed("entries are moving between nodes of the Cluster; try again")
                entries += sum(reply for reply in replies.values() if isinstance(reply, int))
                if self._accounts is not None:
                    self._accounts.deleted(names, soon)
        return entries

    def take_given_up(self) -> list[bytes]:
        keys, self._given_up = self._given_up, []
        return keys

    def _scan(self, node: Node, pattern: bytes, deadline: float) -> Iterator[list[bytes]]:
        cursor = b"0"
        while True:
            soon = min(deadline, self._clock() + self._timeout_s)
            count = b"%d" % SCANNED
            reply = self._ask(node, soon, b"SCAN", cursor, b"MATCH", pattern, b"COUNT", count)
            if isinstance(reply, Refusal):
                self._abandon(f"SCAN: {reply}")
            assert isinstance(reply, list)
            cursor, names = reply  # type: ignore[assignment]
            if names:
                yield names
            if cursor == b"0":
                return

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    # Conversations.

    def _channel(self, node: Node, deadline: float) -> Channel:
        channel = self._channels.get(node)
        if channel is None:
            timeout_s = min(self._timeout_s, max(0.001, deadline - self._clock()))
            try:
                connection = self._address.connection(node, timeout_s)
                channel = self._channels[node] = Channel(connection, self._clock)
            except StoreFailed:
                self._topology.unsettle()
                raise
            except (RedisError, OSError) as error:
                raise StoreFailed(str(error)) from None
        return channel

    def _each(self, commands: dict[bytes, bytes], deadline: float) -> dict[bytes, Reply]:
        """Send one command for each name, and return the answers; those to names that are moving
        between Cluster nodes are None."""
        replies: dict[bytes, Reply] = {}
        pending = list(commands)
        # Once more for what has moved to another node.
        for _ in range(2):
            by_node: defaultdict[Node, list[bytes]] = defaultdict(list)
            for name in pending:
                by_node[self._topology.node_of(name)].append(name)
            pending = []
            try:
                for node, names in by_node.items():
                    self._channel(node, deadline).send([commands[n] for n in names], deadline)
                for node, names in by_node.items():
                    for name in names:
                        reply = self._channels[node].reply(deadline)
                        if isinstance(reply, Refusal) and reply.code == "MOVED":
                            pending.append(name)
                        replies[name] = self._settle(reply, node)
            except StoreFailed:
                self.close()
                raise
            if not pending:
                break
        return replies

    def _converse(self, name: bytes, commands: Sequence[bytes], deadline: float) -> list[Reply]:
        """Send commands to the node that has ``name``, and return the answers, refusals too."""
        replies: list[Reply] = []
        # Once more for what has moved to another node.
        for _ in range(2):
            node = self._topology.node_of(name)
            try:
                channel = self._channel(node, deadline)
                channel.send(list(commands), deadline)
                replies = [channel.reply(deadline) for _ in commands]
            except StoreFailed:
                self.close()
                raise
            moved = [r for r in replies if isinstance(r, Refusal) and r.code == "MOVED"]
            if not moved:
                break
            self._topology.moved(moved[0], node)
        return replies

    def _settle(self, reply: Reply, node: Node) -> Reply:
        """Return the answer; None if the key is on its way to another node.

        Raises:
            StoreFailed: if it is any other error.
        """
        if not isinstance(reply, Refusal):
            return reply
        if not self._note(reply, node):
            self._abandon(str(reply))
        return None

    def _note(self, refusal: Refusal, node: Node) -> bool:
        """Return whether the refusal has to do with keys that move, and learn from it."""
        if refusal.code == "MOVED":
            self._topology.moved(refusal, node)
        return refusal.code in ("MOVED", "ASK", "TRYAGAIN")

    def _abandon(self, reason: str) -> None:
        self.close()
        self._topology.unsettle()
        raise StoreFailed(reason)

    def _discover(self, deadline: float) -> None:
        failure = StoreFailed("no node of the Cluster is known")
        for node in self._topology.nodes:
            try:
                channel = self._channel(node, deadline)
                channel.send([command(b"CLUSTER", b"SLOTS")], deadline)
                reply = channel.reply(deadline)
            except StoreFailed as error:
                self._channels.pop(node, None)
                failure = error
                continue
            if isinstance(reply, list) and reply:
                self._topology.learn(reply, node)
                return
            failure = StoreFailed(f"CLUSTER SLOTS: {reply}")
        raise failure

    def _ask(self, node: Node, deadline: float, *words: bytes) -> Reply:
        channel = self._channel(node, deadline)
        channel.send([command(*words)], deadline)
        return channel.reply(deadline)

    def _info(self, node: Node, deadline: float) -> dict[str, str]:
        reply = self._ask(node, deadline, b"INFO")
        if isinstance(reply, Refusal) and reply.code == "NOPERM":
            # A user without INFO can still store; its capacity is not known then.
            return {}
        if not isinstance(reply, bytes):
            self._abandon(f"INFO: {reply}")
        assert isinstance(reply, bytes)
        lines = reply.decode(errors="replace").splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        version = info.get("redis_version", "0")
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise StoreUnfit(f"it is Redis {version}; 7.0 or newer is needed")
        return info

    def _shake_hands(self, deadline: float) -> None:
        name = self._keyspace.handshake
        node = self._topology.node_of(name)
        reply = self._ask(
            node, deadline, b"SET", name, self._mark, b"NX", b"GET", b"PX", b"%d" % MARK_MS
        )
        if isinstance(reply, Refusal) and reply.code == "OOM":
            # It is full; what it holds can still be read, and nobody can leave another mark.
            reply = self._ask(node, deadline, b"GET", name)
        if isinstance(reply, Refusal):
            self._abandon(str(reply))
        if reply == self._mark:
            self._ask(node, deadline, b"PEXPIRE", name, b"%d" % MARK_MS)
        elif reply is not None:
            raise ForeignSecret(
                "another engine that serves this model uses it with another secret. Give all "
                "replicas the same secret; after a change of the secret this tier starts by "
                f"itself, {MARK_MS // 1000} s after the last engine with the old one has gone"
            )
