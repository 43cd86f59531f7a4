"""A tier in a directory of this machine, which needs no server: files, and an index beside them."""

import os
from collections.abc import Callable
from pathlib import Path

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import ConfigError
from vllm_cachescope.connectors.disk.backend import Backend, Space
from vllm_cachescope.connectors.disk.directory import trouble_with
from vllm_cachescope.connectors.disk.mounts import REMOTE, type_of
from vllm_cachescope.connectors.disk.note_store import DiskNoteStore
from vllm_cachescope.connectors.disk.store import DiskStore
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.leases import Leases

__all__ = ["DiskNoteStore", "DiskStore", "Space", "parse", "stores"]


def parse(path: Path) -> None:
    """Check that a tier could use a directory, or make it if it is not there.

    Raises:
        ConfigError: if it can do neither, others could read what is in it, or other machines could
            have it mounted: only processes of one machine can share an index.
    """
    if (kind := type_of(path)) in REMOTE:
        raise ConfigError(
            f"path: {path} is on a file system that machines share ({kind}), and this tier is one "
            "machine's; allowed: a local one, or a tier of type lmcache with fs_native"
        )
    try:
        if os.path.lexists(path):
            if trouble := trouble_with(path, path.lstat()):
                raise ConfigError(f"path: {trouble}")
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise ConfigError(f"path: {path} cannot be written to")
            return
        parent = next(one for one in path.absolute().parents if one.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"path: {path} cannot be made: {parent} cannot be written to")
    except OSError as error:
        raise ConfigError(f"path: {path} cannot be used: {error.strerror}") from None


def stores(
    path: Path,
    space: Space,
    keyspace: Keyspace,
    secret_digest: bytes,
    leases: Leases,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    quotas: Quotas | None = None,
) -> Callable[[], DiskStore]:
    """Return what makes a store for each thread of a tier.

    Args:
        path: the directory; made if it is not there.
        space: how much the tier may take up.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        clock: the tier's clock.
        wall_clock: Unix time in seconds, in which entries end.
        quotas: what each organisation may hold; None for anything.
    """
    backend = Backend(path, space, quotas, keyspace.namespace, clock, wall_clock)
    return lambda: DiskStore(backend, keyspace, secret_digest, leases, clock)
