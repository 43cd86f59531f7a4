"""The factory of remote tiers' stores and limits, from the tiers' settings.

redis-py and LMCache are imported only where a tier of their type is configured.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import ConfigError, DiskTier, LMCacheTier, RedisTier, Tier
from vllm_cachescope.connectors.disk import DiskNoteStore
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.note_store import NoteStore
from vllm_cachescope.tiers.store import Store

CLIENTS = {"lmcache": "LMCache", "redis": "redis-py"}
"""What tiers of a type need: the Python package with the type's name. Others need none."""


def check(settings: Tier) -> None:
    """Check the address or the adapter in a tier's settings, without connecting to the store.

    Raises:
        ConfigError: if there is no such store, or what it needs is not installed.
    """
    connector = _connector(settings)
    try:
        if isinstance(settings, RedisTier):
            connector.parse(settings.url.get_secret_value(), settings.password())
        elif isinstance(settings, DiskTier):
            connector.parse(settings.path)
        else:
            connector.parse(settings.adapter)
    except ConfigError as error:
        raise ConfigError(f"tier {settings.name}: {error.args[0]}") from None
    except ValueError as error:
        raise ConfigError(f"tier {settings.name}: url: {error} (value not shown)") from None


def limits_of(settings: Tier) -> Limits:
    """Return the limits of a tier: what it may cost a request and this process."""
    return Limits(
        load_deadline_s=settings.load_deadline,
        load_share=settings.load_share,
        timeout_s=settings.timeout,
        inflight_bytes=int(settings.max_inflight_bytes),
        connections=settings.connections,
        failures=settings.failures,
        first_probe_s=settings.first_probe,
        longest_probe_s=settings.longest_probe,
    )


def stores(
    settings: Tier,
    slot_bytes: int,
    keyspace: Keyspace,
    secret_digest: bytes,
    leases: Leases,
    clock: Callable[[], float],
    quotas: Quotas | None,
) -> Callable[[], Store]:
    """Return a function that makes a store; a tier calls it once for each of its threads.

    Args:
        settings: the tier's part of the configuration; `check` has accepted it.
        slot_bytes: bytes per block.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        clock: the tier's clock.
        quotas: what each organisation may hold, for a store that counts what it holds.
    """
    made: Callable[[], Store]
    if isinstance(settings, RedisTier):
        url = settings.url.get_secret_value()
        made = _connector(settings).stores(
            url,
            settings.timeout,
            keyspace,
            secret_digest,
            leases,
            clock,
            time.time,
            quotas,
            settings.password(),
        )
    elif isinstance(settings, DiskTier):
        connector = _connector(settings)
        space = connector.Space(int(settings.capacity), int(settings.keep_free))
        made = connector.stores(
            settings.path, space, keyspace, secret_digest, leases, clock, time.time, quotas
        )
    else:
        made = _connector(settings).stores(
            settings.adapter,
            slot_bytes,
            settings.connections,
            settings.timeout,
            keyspace,
            secret_digest,
            leases,
            clock,
            time.time,
        )
    return made


def note_stores(
    tiers: Sequence[Tier],
    secret_digest: bytes,
    clock: Callable[[], float],
    local: Callable[[], Path] | None = None,
) -> Callable[[], NoteStore] | None:
    """Return a function that makes the store of notes on sessions: in the first Redis, or in the
    first directory of a disk tier; None if there is neither.

    Args:
        tiers: the tiers' settings; `check` has accepted them.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        clock: seconds, never running backwards.
        local: returns a directory to use where there is neither; None for none.
    """
    redis = next((one for one in tiers if isinstance(one, RedisTier)), None)
    if redis is not None:
        url, password = redis.url.get_secret_value(), redis.password()
        made: Callable[[], NoteStore] = _connector(redis).note_stores(
            url, redis.timeout, secret_digest, clock, password
        )
        return made
    disk = next((one.path for one in tiers if isinstance(one, DiskTier)), None)
    if disk is None and local is not None:
        disk = local()
    if disk is None:
        return None
    return partial(DiskNoteStore, disk, secret_digest, clock)


def counts_usage(settings: Tier) -> bool:
    """Whether the store of a tier counts what organisations hold, for all engines at once."""
    return isinstance(settings, RedisTier | DiskTier)


def keeps_purge_log(settings: Tier) -> bool:
    """Whether the store of a tier keeps a purge log, so that other replicas may have this one
    purge."""
    return isinstance(settings, RedisTier | DiskTier)


def is_on_disk(settings: Tier) -> bool:
    """Whether the store of a tier is a file system, local or mounted."""
    if isinstance(settings, DiskTier):
        return True
    return isinstance(settings, LMCacheTier) and settings.adapter["type"] in ("fs", "fs_native")


def _connector(settings: Tier) -> ModuleType:
    """Return the package of a tier's type.

    Raises:
        ConfigError: if the client that the package needs is not installed.
    """
    try:
        return import_module(f"vllm_cachescope.connectors.{settings.type}")
    except ImportError as error:
        if settings.type not in CLIENTS:
            raise
        raise ConfigError(
            f"tier {settings.name}: type {settings.type} needs {CLIENTS[settings.type]} "
            f"({error}); install it with pip install 'vllm-cachescope[{settings.type}]'"
        ) from error
