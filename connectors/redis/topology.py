"""The topology of a Redis Cluster: which node has which keys."""

import threading
from collections.abc import Iterable
from typing import Any

from redis.crc import key_slot

from vllm_cachescope.connectors.redis.address import Address
from vllm_cachescope.connectors.redis.channel import Refusal

Node = tuple[str, int] | None
"""A Cluster node, by host and port; None for the one server where there is no Cluster."""


class Topology:
    """Which Cluster node has which keys. The threads of a tier share it.

    Args:
        address: the Redis; its hosts are asked while nothing else is known.
    """

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
        """Return the node that has ``name``."""
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
        """Take a ``MOVED slot host:port``, which the node ``asked`` gave."""
        _, slot, where = refusal.split(" ")[:3]
        host, _, port = where.rpartition(":")
        with self._lock:
            self._slots[int(slot)] = (host or (asked[0] if asked else ""), int(port))

    def reset(self) -> None:
        """Drop what is known, since a node has gone. The nodes are looked for anew."""
        with self._lock:
            self._slots = {}
