"""Drives a tier over one of LMCache's adapters as an engine's scheduler does."""

import time
from collections.abc import Callable
from typing import Any

from tests.redis.engine_side import SECRET, SLOT, EngineSide
from tests.redis.wall import Wall
from vllm_cachescope.connectors import lmcache
from vllm_cachescope.connectors.lmcache.store import LMCacheStore
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.leases import Leases


class LMCacheSide(EngineSide):
    """A tier over an adapter, with memory in front of it."""

    def __init__(self, adapter: dict[str, Any], wall: Wall, **options: Any) -> None:
        self._adapter = adapter
        super().__init__(str(adapter), wall=wall, **options)

    def new_store(self) -> LMCacheStore:
        """Return a store as a new engine's thread has it, with an adapter of its own."""
        return self._stores("", SECRET)()

    def _stores(self, url: str, secret: bytes) -> Callable[[], LMCacheStore]:
        return lmcache.stores(
            self._adapter,
            SLOT,
            self.limits.connections,
            self.limits.timeout_s,
            self.keyspace,
            secret_digest(secret),
            Leases(secret),
            time.monotonic,
            self.wall,
        )
