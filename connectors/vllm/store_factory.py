"""The factory of remote tiers' stores and limits, from the tiers' settings.

redis-py and LMCache are imported only where a tier of their type is configured.
"""

import time
from collections.abc import Callable
from types import ModuleType

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import ConfigError, LMCacheTier, RedisTier, Tier
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.store import Store


def check(settings: Tier) -> None:
    """Check the address or the adapter in a tier's settings, without connecting to the store.

    Raises:
        ConfigError: if there is no such store, or what it needs is not installed.
    """
    if isinstance(settings, RedisTier):
        redis = _redis(settings)
        try:
            redis.parse(settings.url.get_secret_value())
        except ValueError as error:
            raise ConfigError(f"tier {settings.name}: url: {error} (value not shown)") from None
    else:
        lmcache = _lmcache(settings)
        try:
            lmcache.parse(settings.adapter)
        except ConfigError as error:
            raise ConfigError(f"tier {settings.name}: {error.args[0]}") from None


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
    clock: Callable[[], float],
    quotas: Quotas | None,
) -> Callable[[], Store]:
    """Return a function that makes a store; a tier calls it once for each of its threads.

    Args:
        settings: the tier's part of the configuration; `check` has accepted it.
        slot_bytes: bytes per block.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        clock: the tier's clock.
        quotas: what each organisation may hold, for a store that counts what it holds.
    """
    made: Callable[[], Store]
    if isinstance(settings, RedisTier):
        url = settings.url.get_secret_value()
        made = _redis(settings).stores(
            url, settings.timeout, keyspace, secret_digest, clock, quotas
        )
    else:
        made = _lmcache(settings).stores(
            settings.adapter,
            slot_bytes,
            settings.connections,
            settings.timeout,
            keyspace,
            secret_digest,
            clock,
            time.time,
        )
    return made


def counts_usage(settings: Tier) -> bool:
    """Whether the store of a tier counts what organisations hold, for all engines at once."""
    return isinstance(settings, RedisTier)


def _redis(settings: RedisTier) -> ModuleType:
    try:
        from vllm_cachescope.connectors import redis
    except ImportError as error:
        raise ConfigError(
            f"tier {settings.name}: type redis needs redis-py ({error}); install it with "
            "pip install 'vllm-cachescope[redis]'"
        ) from error
    return redis


def _lmcache(settings: LMCacheTier) -> ModuleType:
    try:
        from vllm_cachescope.connectors import lmcache
    except ImportError as error:
        raise ConfigError(
            f"tier {settings.name}: type lmcache needs LMCache ({error}); install it with "
            "pip install 'vllm-cachescope[lmcache]'"
        ) from error
    return lmcache
