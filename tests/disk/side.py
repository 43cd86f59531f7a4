"""Drives a disk tier as an engine's scheduler does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.redis.engine_side import SECRET, SLOT, EngineSide
from vllm_cachescope.connectors import disk
from vllm_cachescope.connectors.disk.directory import INDEX, VALUES
from vllm_cachescope.connectors.disk.store import DiskStore
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.leases import Leases

FILE = SLOT + 4096
"""Bytes that a block's file takes up."""


class DiskSide(EngineSide):
    """A tier in a directory, with memory in front of it."""

    def __init__(
        self, path: Path, capacity: int = 2**30, keep_free: int = 0, **options: Any
    ) -> None:
        self._path = path
        self._space = disk.Space(capacity, keep_free)
        super().__init__(str(path), **options)

    def new_store(self) -> DiskStore:
        """Return a store as a new engine's thread has it."""
        return self._stores("", SECRET)()

    def _stores(self, url: str, secret: bytes) -> Callable[[], DiskStore]:
        return disk.stores(
            self._path,
            self._space,
            self.keyspace,
            secret_digest(secret),
            Leases(secret),
            time.monotonic,
            self.wall,
            self.quotas,
        )


def files(path: Path) -> list[Path]:
    """Return the files of values in a directory."""
    return sorted(path.glob(f"{VALUES}/*/*"))


def index(path: Path) -> Path:
    """Return the file of the index."""
    return path / INDEX
