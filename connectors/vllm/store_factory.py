"""Remote tiers' settings made into stores, by their type, and into limits. What a type needs is
imported for its users only."""

import time
from collections.abc import Callable
from types import ModuleType

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import ConfigError, LMCacheTier, RedisTier, Tier
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.store import Store


def check(settings: Tier) -> None:
    """Look into what a tier's configuration says of its store.

    Raises:
        ConfigError: if there is no such store, or what it needs is not installed.
    """
    if isinstance(settings, LMCacheTier):
        lmcache = _lmcache(settings)
        try:
            lmcache.parse(settings.adapter)
        except ConfigError as error:
            raise ConfigError(f"tier {settings.name}: {error.args[0]}") from None


def limits_of(settings: Tier) -> Limits:
    """Return what a tier may cost."""
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
    mark: bytes,
    clock: Callable[[], float],
    shares: Quotas | None,
) -> Callable[[], Store]:
    """Return what makes a store for each thread of a tier.

    Args:
        settings: the tier's part of the configuration, which has been checked.
        slot_bytes: bytes per block.
        keyspace: names of the entries.
        mark: tells our secret from others; see `keyspace.secret_mark`.
        clock: the tier's clock.
        shares: what each organisation may have, for a store that keeps account of that.
    """
    if isinstance(settings, RedisTier):
        from vllm_cachescope.connectors import redis

        url = settings.url.get_secret_value()
        return redis.stores(url, settings.timeout, keyspace, mark, clock, shares)
    made: Callable[[], Store] = _lmcache(settings).stores(
        settings.adapter,
        slot_bytes,
        settings.connections,
        settings.timeout,
        keyspace,
        mark,
        clock,
        time.time,
    )
    return made


def keeps_accounts(settings: Tier) -> bool:
    """Whether the store of a tier counts what organisations hold, for all engines at once."""
    return isinstance(settings, RedisTier)


def _lmcache(settings: LMCacheTier) -> ModuleType:
    try:
        from vllm_cachescope.connectors import lmcache
    except ImportError as error:
        raise ConfigError(
            f"tier {settings.name}: type lmcache needs LMCache ({error}); install it with "
            "pip install 'vllm-cachescope[lmcache]'"
        ) from error
    return lmcache
