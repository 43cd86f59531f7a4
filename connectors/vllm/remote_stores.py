"""The stores of remote tiers, looked at from outside: reachable, and of our secret."""

import os
import time
from importlib import metadata

from pydantic import ByteSize

from vllm_cachescope.config import Config, DiskTier, Tier
from vllm_cachescope.connectors.vllm import store_factory
from vllm_cachescope.connectors.vllm.findings import Finding, Status
from vllm_cachescope.tiers.keyspace import Keyspace, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.store import Store, StoreFailed, StoreUnfit

PATIENCE_S = 10.0
"""How long a store may take to answer, and to list the names of millions of entries, in seconds."""

LMCACHE = "0.5.6"
"""The version of LMCache that the tier was built with."""

_SLOT_BYTES = 4096  # nothing is loaded


def opened(settings: Tier, config: Config) -> Store:
    """Return a tier's store, with a namespace in which no engine keeps anything.

    Args:
        settings: the tier's part of the configuration.
        config: the configuration, which has a secret.
    """
    secret = config.secret_bytes()
    make = store_factory.stores(
        settings,
        _SLOT_BYTES,
        Keyspace({"looks": "only"}),
        secret_digest(secret),
        Leases(secret),
        time.monotonic,
        None,
    )
    return make()


def check(settings: Tier, config: Config) -> Finding:
    """Return whether engines of this configuration can use the store of a tier.

    Args:
        settings: the tier's part of the configuration.
        config: the configuration, which has a secret.
    """
    subject = f"tier {settings.name}"
    ours = secret_digest(config.secret_bytes())
    store = opened(settings, config)
    try:
        digests = store.secret_digests(time.monotonic() + PATIENCE_S)
    except StoreFailed as error:
        found = f"{store.address} does not answer: {error}"
        remedy = "a store that answers; until then requests run as if it held nothing"
        return Finding(subject, Status.FAILURE, found, remedy)
    except StoreUnfit as error:
        return Finding(subject, Status.FAILURE, f"{store.address}: {error}", "another store")
    finally:
        store.close()
    if digests is None:
        found = "whether engines with another secret use it cannot be told"
    elif not digests:
        found = "no engine uses it now"
    elif ours in digests:
        found = "engines with this secret use it"
    else:
        found = f"{store.address} is used by engines with another secret, and by none with this one"
        remedy = "one secret for all replicas of a model; then ignore this for other models"
        return Finding(subject, Status.FAILURE, found, remedy)
    if isinstance(settings, DiskTier) and (crowded := _crowding(settings)):
        remedy = "a smaller capacity, or a larger file system"
        return Finding(subject, Status.WARNING, f"{store.address}: {crowded}; {found}", remedy)
    return Finding(subject, Status.OK, f"{store.address} answers; {found}")


def _crowding(settings: DiskTier) -> str | None:
    """Return why a tier will not reach its capacity; None if it can."""
    there = next(one for one in (settings.path, *settings.path.parents) if one.exists())
    system = os.statvfs(there)
    most = system.f_blocks * system.f_frsize - settings.keep_free
    if settings.capacity <= most:
        return None
    return (
        f"capacity is {settings.capacity.human_readable()}, and its file system has room for "
        f"{ByteSize(max(0, most)).human_readable()} with keep_free"
    )


def check_package(name: str) -> Finding:
    """Return which version is installed of the Python package that tiers of a type need.

    Args:
        name: the type, which is the package's name, too.
    """
    version = metadata.version(name)
    if name == "lmcache" and version != LMCACHE:
        found = f"{version}; the tier was built with {LMCACHE}"
        return Finding(f"package {name}", Status.WARNING, found, f"lmcache=={LMCACHE}")
    return Finding(f"package {name}", Status.OK, version)
