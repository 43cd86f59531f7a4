"""A tier in Redis, or anything that speaks its protocol and has its commands, as Valkey does."""

from collections.abc import Callable

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.redis.address import parse
from vllm_cachescope.connectors.redis.note_store import RedisNoteStore
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.connectors.redis.store import RedisStore
from vllm_cachescope.connectors.redis.topology import Topology
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.note_store import BOUNDS, NoteBounds

__all__ = ["note_stores", "parse", "stores"]


def note_stores(
    url: str,
    timeout_s: float,
    secret_digest: bytes,
    clock: Callable[[], float],
    password: str | None = None,
    bounds: NoteBounds = BOUNDS,
) -> Callable[[], RedisNoteStore]:
    """Return what makes a store of notes on sessions; see `address.parse` and `RedisNoteStore`.

    Raises:
        ValueError: if ``url`` is none.
    """
    address = parse(url, password)
    return lambda: RedisNoteStore(
        address, Topology(address), secret_digest, timeout_s, clock, bounds
    )


def stores(
    url: str,
    timeout_s: float,
    keyspace: Keyspace,
    secret_digest: bytes,
    leases: Leases,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    quotas: Quotas | None = None,
    password: str | None = None,
) -> Callable[[], RedisStore]:
    """Return what makes a store for each thread of a tier; see `address.parse` and `RedisStore`.

    Raises:
        ValueError: if ``url`` is none.
    """
    address = parse(url, password)
    topology, server_clock = Topology(address), ServerClock()
    return lambda: RedisStore(
        address,
        topology,
        keyspace,
        secret_digest,
        leases,
        timeout_s,
        clock,
        wall_clock,
        quotas,
        server_clock,
    )
