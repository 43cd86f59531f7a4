"""A purge without a server: entries are deleted in the stores, and the engines on them are told by
the stores' purge logs."""

import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from vllm_cachescope.config import Config, ConfigError, Tier
from vllm_cachescope.connectors.vllm import config_check, remote_stores, store_factory
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.owner_tags import EVERYONE, OwnerTags
from vllm_cachescope.tenancy.scope import short_name
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.purge_announcement import announce
from vllm_cachescope.tiers.purge_notices import PurgeNotice, PurgeNotices
from vllm_cachescope.tiers.purges import PURGE_S
from vllm_cachescope.tiers.store import Store, StoreFailed, StoreUnfit


def settings_of(redis_url: str | None, settings: Mapping[str, Any]) -> Config:
    """Return the configuration that names the stores and the secret.

    Args:
        redis_url: the address of a Redis to use in place of the tiers of the configuration.
        settings: keys of the configuration.

    Raises:
        ConfigError: if it cannot be used, or has no secret, or no store with a purge log.
    """
    own = dict(settings)
    if redis_url is not None:
        own["tiers"] = [{"type": "redis", "url": redis_url}]
    config = config_check.load_checked(own)
    if not any(map(store_factory.keeps_purge_log, config.tiers)):
        raise ConfigError(
            "tiers: none keeps a purge log; allowed: one that does, as Redis, or --redis"
        )
    return config


def purge(
    config: Config,
    org: str | None,
    session: str | None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> bool:
    """Purge entries, and print how many and who has. Return whether it is known that all are gone.

    Args:
        config: from `settings_of`.
        org: the organisation by a name or its id; None for all, or with a session for requests
            without a key.
        session: one session of it; None for all.
        clock: seconds, never running backwards.
        pause: waits for so many seconds.

    Raises:
        ConfigError: if ``org`` is no organisation, or the file of tenants cannot be read.
    """
    notices = _notices(config, org, session)
    tiers = [tier for tier in config.tiers if store_factory.keeps_purge_log(tier)]
    # Each of them, though one fails.
    reached = [_purge_tier(config, tier, notices, clock, pause) for tier in tiers]
    return all(reached)


def _notices(config: Config, org: str | None, session: str | None) -> list[PurgeNotice]:
    if session is not None:
        session, org = short_name(session), org or ANONYMOUS
    if org is None:
        return [PurgeNotice(secrets.token_hex(8), b"")]
    if org == EVERYONE and session is not None:
        raise ConfigError(f"--session: what is {EVERYONE} belongs to no session")
    secret = config.secret_bytes()
    directory = CallerDirectory(secret, config.tenant_names(), config.org_header)
    if not (orgs := directory.named(org)):
        raise ConfigError(
            f"--org: {org!r} is no organisation; allowed: a name in tenants, or an id"
        )
    return [
        PurgeNotice(secrets.token_hex(8), prefix, one, session)
        for one in orgs
        for prefix in OwnerTags(secret).prefixes(one, session)
    ]


def _purge_tier(
    config: Config,
    tier: Tier,
    notices: list[PurgeNotice],
    clock: Callable[[], float],
    pause: Callable[[float], object],
) -> bool:
    store = remote_stores.opened(tier, config)
    try:
        return _purge_store(config, tier, store, notices, clock, pause)
    except (StoreFailed, StoreUnfit) as error:
        print(f"{store.address}: could not be reached: {error}", file=sys.stderr)
        return False
    finally:
        store.close()


def _purge_store(
    config: Config,
    tier: Tier,
    store: Store,
    notices: list[PurgeNotice],
    clock: Callable[[], float],
    pause: Callable[[float], object],
) -> bool:
    secret, address = config.secret_bytes(), store.address
    digests = store.secret_digests(clock() + remote_stores.PATIENCE_S)
    if digests and secret_digest(secret) not in digests:
        # Nothing there can be read or told with this one.
        print(f"{address}: engines with another secret use it, and none with this", file=sys.stderr)
        return False
    log = store.purge_log()
    assert log is not None
    seals, entries, is_whole = PurgeNotices(secret), 0, True
    confirmed: set[str] = set()
    for notice in notices:
        # Before engines hear of it: what they store meanwhile they delete themselves.
        entries += store.purge(notice.prefix, clock() + PURGE_S)
        heard = announce(log, seals, notice, tier.timeout, clock, pause)
        confirmed.update(heard.confirmed)
        for name, reason in heard.missing.items():
            print(f"{address}: not known to be done: {name} ({reason})", file=sys.stderr)
            is_whole = False
    print(f"{address}: entries forgotten: {tier.name} {entries}")
    done = ", ".join(sorted(confirmed)) or "no engine is running"
    print(f"{address}: done as well: {done}" if confirmed else f"{address}: {done}")
    return is_whole
