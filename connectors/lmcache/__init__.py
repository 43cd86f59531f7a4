"""A tier over LMCache's L2 adapters: file systems, RESP, Valkey, S3, Mooncake and others.

The adapters store one object of bytes under one key, and know nothing of lifetimes. An entry is
therefore two objects: the value, as any store has it, and a record of when it expires, which is
small and rewritten when the entry is used. See `store`.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

# A cache inside somebody's engine has nothing to report to LMCache's authors.
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

from vllm_cachescope.connectors.lmcache.adapters import parse, shown
from vllm_cachescope.connectors.lmcache.backend import Backend
from vllm_cachescope.connectors.lmcache.llvmlite_library import refuse_special_names
from vllm_cachescope.connectors.lmcache.memory import Staging
from vllm_cachescope.connectors.lmcache.store import LMCacheStore
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.leases import Leases

__all__ = ["parse", "stores"]

refuse_special_names()


def stores(
    adapter: Mapping[str, Any],
    slot_bytes: int,
    readers: int,
    timeout_s: float,
    keyspace: Keyspace,
    secret_digest: bytes,
    leases: Leases,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> Callable[[], LMCacheStore]:
    """Return what makes a store for each thread of a tier; they share one adapter.

    Args:
        adapter: the adapter's configuration, as LMCache has it: ``type`` and what that type needs.
        slot_bytes: bytes per block.
        readers: how many threads read.
        timeout_s: how long any one thing that the adapter does may take, in seconds.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        clock: the tier's clock.
        wall_clock: Unix time in seconds, on which entries expire: that of all engines that share
            the entries.

    Raises:
        ConfigError: if ``adapter`` is not one that LMCache knows.
    """
    backend = Backend(
        parse(adapter),
        Staging(slot_bytes, readers + 1),
        timeout_s,
        keyspace.namespace,
        secret_digest,
        leases,
        clock,
        wall_clock,
    )
    return lambda: LMCacheStore(backend, shown(adapter))
