"""A tier in Redis, or anything that speaks its protocol and has its commands, as Valkey does."""

from collections.abc import Callable

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.redis.accounts import ServerClock
from vllm_cachescope.connectors.redis.address import parse
from vllm_cachescope.connectors.redis.store import RedisStore, Topology
from vllm_cachescope.tiers.keyspace import Keyspace

__all__ = ["parse", "stores"]


def stores(
    url: str,
    timeout_s: float,
    keyspace: Keyspace,
    mark: bytes,
    clock: Callable[[], float],
    shares: Quotas | None = None,
) -> Callable[[], RedisStore]:
    """Return what makes a store for each thread of a tier; see `RedisStore`.

    Raises:
        ValueError: if ``url`` is none.
    """
    address = parse(url)
    topology, server_clock = Topology(address), ServerClock()
    return lambda: RedisStore(
        address, topology, keyspace, mark, timeout_s, clock, shares, server_clock
    )
