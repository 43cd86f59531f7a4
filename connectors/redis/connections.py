"""One thread's connections to the nodes of a Redis."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from redis.exceptions import RedisError

from vllm_cachescope.connectors.redis.address import Address
from vllm_cachescope.connectors.redis.channel import Channel, Refusal, Reply, command
from vllm_cachescope.connectors.redis.topology import Node, Topology
from vllm_cachescope.tiers.store import StoreFailed


class Connections:
    """One thread's connections to the nodes of a Redis, one to each.

    A connection that fails is closed. `ask_each` and `ask_node_of` close all of them then: answers
    that are still on their way would be taken for those to the next questions.

    Args:
        address: the Redis.
        topology: shared with the tier's other threads.
        timeout_s: how long connecting to one node may take, in seconds.
        clock: the tier's clock.
    """

    def __init__(
        self,
        address: Address,
        topology: Topology,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.topology = topology
        self._address = address
        self._timeout_s = timeout_s
        self._clock = clock
        self._channels: dict[Node, Channel] = {}

    def alive(self) -> bool:
        """Whether there is a connection to each node, as far as can be told without asking."""
        for node, channel in list(self._channels.items()):
            if not channel.alive:
                channel.close()
                del self._channels[node]
        return all(node in self._channels for node in self.topology.nodes)

    def connect(self, deadline: float) -> None:
        """Have a connection to each node.

        Raises:
            StoreFailed: if one is not to be had.
        """
        if not self.topology.known:
            self.discover(deadline)
        for node in self.topology.nodes:
            self.channel(node, deadline)

    def close(self) -> None:
        """Close all connections."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def channel(self, node: Node, deadline: float) -> Channel:
        """Return the connection to a node, a new one if there is none.

        Raises:
            StoreFailed: if there is none to be had.
        """
        channel = self._channels.get(node)
        if channel is None:
            timeout_s = min(self._timeout_s, max(0.001, deadline - self._clock()))
            try:
                connection = self._address.connection(node, timeout_s)
                channel = self._channels[node] = Channel(connection, self._clock)
            except StoreFailed:
                self.topology.reset()
                raise
            except (RedisError, OSError) as error:
                raise StoreFailed(str(error)) from None
        return channel

    def discover(self, deadline: float) -> None:
        """Find out which nodes a Cluster has.

        Raises:
            StoreFailed: if none of those that are known tells.
        """
        failure = StoreFailed("no node of the Cluster is known")
        for node in self.topology.nodes:
            try:
                reply = self.ask(node, deadline, b"CLUSTER", b"SLOTS")
            except StoreFailed as error:
                self._channels.pop(node, None)
                failure = error
                continue
            if isinstance(reply, list) and reply:
                self.topology.learn(reply, node)
                return
            failure = StoreFailed(f"CLUSTER SLOTS: {reply!r}")
        raise failure

    def ask(self, node: Node, deadline: float, *words: bytes) -> Reply:
        """Send one command to a node, and return the answer, even if that is a refusal."""
        channel = self.channel(node, deadline)
        channel.send([command(*words)], deadline)
        return channel.reply(deadline)

    def ask_each(self, commands: Mapping[bytes, bytes], deadline: float) -> dict[bytes, Reply]:
        """Send one command for each name, to the node that has it; return the answers by name.
        Those for names that are moving between Cluster nodes are None.

        Raises:
            StoreFailed: if a node does not answer, or refuses.
        """
        replies: dict[bytes, Reply] = {}
        pending = list(commands)
        # Once more for what has moved to another node.
        for _ in range(2):
            by_node: defaultdict[Node, list[bytes]] = defaultdict(list)
            for name in pending:
                by_node[self.topology.node_of(name)].append(name)
            pending = []
            try:
                for node, names in by_node.items():
                    self.channel(node, deadline).send([commands[n] for n in names], deadline)
                for node, names in by_node.items():
                    for name in names:
                        reply = self._channels[node].reply(deadline)
                        if isinstance(reply, Refusal) and reply.code == "MOVED":
                            pending.append(name)
                        replies[name] = self.settle(reply, node)
            except StoreFailed:
                self.close()
                raise
            if not pending:
                break
        return replies

    def ask_node_of(self, name: bytes, commands: Sequence[bytes], deadline: float) -> list[Reply]:
        """Send commands to the node that has ``name``, and return the answers, refusals too.

        Raises:
            StoreFailed: if the node does not answer.
        """
        replies: list[Reply] = []
        # Once more for what has moved to another node.
        for _ in range(2):
            node = self.topology.node_of(name)
            try:
                channel = self.channel(node, deadline)
                channel.send(list(commands), deadline)
                replies = [channel.reply(deadline) for _ in commands]
            except StoreFailed:
                self.close()
                raise
            moved = [r for r in replies if isinstance(r, Refusal) and r.code == "MOVED"]
            if not moved:
                break
            self.topology.moved(moved[0], node)
        return replies

    def settle(self, reply: Reply, node: Node) -> Reply:
        """Return a node's answer; None if the key is on its way to another node.

        Raises:
            StoreFailed: if it is any other refusal.
        """
        if not isinstance(reply, Refusal):
            return reply
        if not self.is_moving(reply, node):
            self.abandon(str(reply))
        return None

    def is_moving(self, refusal: Refusal, node: Node) -> bool:
        """Return whether a node refused because keys move, and learn from that where they are."""
        if refusal.code == "MOVED":
            self.topology.moved(refusal, node)
        return refusal.code in ("MOVED", "ASK", "TRYAGAIN")

    def abandon(self, reason: str) -> NoReturn:
        """Close all connections, and look for the nodes anew the next time.

        Raises:
            StoreFailed: always, with ``reason``.
        """
        self.close()
        self.topology.reset()
        raise StoreFailed(reason)
