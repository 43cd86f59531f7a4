"""Drives a tier over one of LMCache's adapters as an engine's scheduler does."""

import time
from collections.abc import Callable
from typing import Any

from tests.redis.engine_side import SECRET, SLOT, EngineSide
from vllm_cachescope.connectors import lmcache
from vllm_cachescope.connectors.lmcache.store import LMCacheStore
from vllm_cachescope.tiers.keyspace import secret_digest


class Wall:
    """Unix time that passes only when it is told to."""

    def __init__(self) -> None:
        self._now = time.time()

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self._now += seconds


class LMCacheSide(EngineSide):
    """A tier over an adapter, with memory in front of it."""

    def __init__(self, adapter: dict[str, Any], wall: Wall, **options: Any) -> None:
        self._adapter, self._wall = adapter, wall
        super().__init__(str(adapter), **options)

    def new_store(self) -> LMCacheStore:
        """Return a store as a new engine's thread has it, with an adapter of its own."""
        return self._stores("", secret_digest(SECRET))()

    def _stores(self, url: str, secret_digest: bytes) -> Callable[[], LMCacheStore]:
        return lmcache.stores(
            self._adapter,
            SLOT,
            self.limits.connections,
            self.limits.timeout_s,
            self.keyspace,
            secret_digest,
            time.monotonic,
            self._wall,
        )
