"""Evictions and residency: what leaves the tiers, too early or not, and what they hold."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.limits import EARLY_SHARE
from monitoring.panels import Query, Words, graph
from monitoring.queries import CHOSEN, largest, of, quantile, rate, ratio, total
from vllm_cachescope.metrics import (
    EARLY_EVICTIONS,
    EVICTION_IDLE,
    EVICTIONS,
    QUOTA_USED,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    TIER_CAPACITY_BYTES,
    TIER_USED_BYTES,
)


def panels() -> list[timeseries.Panel]:
    """Return the row's panels."""
    last = of(EARLY_EVICTIONS, CHOSEN, 'last_copy="true"')
    left = total(rate(of(EVICTIONS, CHOSEN)), "tier")
    return [
        graph(
            Words(
                "Evictions by tier and reason",
                "Entries that left a tier in a second.",
                "ttl is as it should be. capacity: the tier is full. quota: an organisation is "
                "over its quota. reset and purge: somebody asked for it.",
                "None",
            ),
            [Query(total(rate(of(EVICTIONS, CHOSEN)), "tier", "reason"), "{{tier}}, {{reason}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Evictions before their time",
                "Share of what left a tier that was the last copy of an entry whose lifetime was "
                "not over: promises not kept.",
                f"Above {EARLY_SHARE:.0%} for want of room *CacheScopeChurn* fires: give the tier "
                "more memory, put a tier behind it, or mark less for 1h.",
                "None",
            ),
            [
                Query(
                    ratio(total(rate(last), "tier", "reason"), left, "on (tier) group_left ()"),
                    "{{tier}}, {{reason}}",
                )
            ],
            "percentunit",
            limit=EARLY_SHARE,
        ),
        graph(
            Words(
                "Idle time at early eviction",
                "Share of its lifetime that an entry had idled for when it left before its time: "
                "the median.",
                "Near 0 is churn: entries go before anyone could come back for them. Near 1 "
                "little is lost.",
                "None",
            ),
            [
                Query(
                    quantile(0.5, of(EVICTION_IDLE, CHOSEN, suffix="_bucket"), ("tier", "ttl")),
                    "{{tier}}, {{ttl}}",
                )
            ],
            "percentunit",
            top=1,
        ),
        graph(
            Words(
                "Resident bytes by tier and TTL",
                "Unexpired KV that the device and the CPU tier hold.",
                "If 1h holds nearly all of a tier, 5m has no room: see *Hit ratio by TTL*.",
            ),
            [Query(total(of(RESIDENT_BYTES, CHOSEN), "tier", "ttl"), "{{tier}}, {{ttl}}")],
            "bytes",
            span=6,
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Resident entries by tier and TTL",
                "The same in entries: blocks of the device, chunks of the CPU tier.",
                "For sizing: bytes divided by entries is what one entry takes.",
            ),
            [Query(total(of(RESIDENT_ENTRIES, CHOSEN), "tier", "ttl"), "{{tier}}, {{ttl}}")],
            "short",
            span=6,
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Fill of the tiers",
                "Share of its capacity that a tier has in use; of a remote tier, whoever uses it.",
                "Full is fine as long as nothing leaves before its time. A remote store near 100 % "
                "evicts by itself: give quotas a `capacity` below its limit.",
            ),
            [
                Query(
                    ratio(
                        total(of(TIER_USED_BYTES, CHOSEN), "tier"),
                        total(of(TIER_CAPACITY_BYTES, CHOSEN), "tier"),
                    ),
                    "{{tier}}",
                )
            ],
            "percentunit",
            span=6,
            top=1,
        ),
        graph(
            Words(
                "Fullest quota",
                "The largest share of its quota that any organisation holds, by tier.",
                "At 100 % that organisation evicts its own entries: `GET /cachescope/health` with "
                "the operator token says whose. Raise its quota, or leave it.",
                "No quotas",
            ),
            [Query(largest(of(QUOTA_USED, CHOSEN), "tier"), "{{tier}}")],
            "percentunit",
            span=6,
        ),
    ]
