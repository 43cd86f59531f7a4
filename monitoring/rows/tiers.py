"""Tiers: which are up, what comes late, and how much they move."""

from grafana_foundation_sdk.builders import statetimeline, timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.panels import GREEN, RED, Query, Words, graph, states
from monitoring.queries import CHOSEN, of, quantile, rate, smallest, total
from vllm_cachescope.metrics import (
    ENDED_ENTRIES,
    PREFETCHED_CHUNKS,
    PROMOTION_WAIT_SECONDS,
    PROMOTIONS,
    TIER_BYTES,
    TIER_INFLIGHT_BYTES,
    TIER_KEYS,
    TIER_OPERATION_SECONDS,
    TIER_QUEUE,
    TIER_UP,
)

_BAD = 'outcome=~"late|dropped|failed|gone|refused|damaged"'


def panels() -> list[statetimeline.Panel | timeseries.Panel]:
    """Return the row's panels."""
    return [
        states(
            Words(
                "Tiers up",
                "Whether each tier answers and may be used, by replica.",
                "Red for longer than a minute: *CacheScopeTierDown* fires; see its runbook.",
                "No engine",
            ),
            Query(smallest(of(TIER_UP, CHOSEN), "tier", "instance"), "{{tier}}, {{instance}}"),
            8,
            {"1": ("up", GREEN), "0": ("down", RED)},
        ),
        graph(
            Words(
                "Late, dropped, failed",
                "Chunks of remote tiers in a second that were of no use: late: after the deadline; "
                "dropped: the queue was full or the tier down; gone: evicted since the lookup; "
                "refused, failed, damaged: as they say.",
                "late: relieve the store, or raise `load_deadline`. dropped: more "
                "`max_inflight_bytes` or `connections`. damaged: somebody else writes there.",
                "None",
            ),
            [
                Query(
                    total(rate(of(TIER_KEYS, CHOSEN, _BAD)), "tier", "operation", "outcome"),
                    "{{tier}}, {{operation}} {{outcome}}",
                )
            ],
            "short",
        ),
        graph(
            Words(
                "Chunks asked of remote tiers",
                "Chunks in a second by operation and outcome.",
                "Hits of lookups should turn into hits of loads. Stores that are mostly "
                "“present” are fine: another replica had stored them.",
                "No remote tier",
            ),
            [
                Query(
                    total(rate(of(TIER_KEYS, CHOSEN)), "tier", "operation", "outcome"),
                    "{{tier}}, {{operation}} {{outcome}}",
                )
            ],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Latency of the tiers",
                "Time of one operation: of a remote tier an exchange with its store, of the CPU "
                "tier a copy. Median and 99th percentile.",
                "Compare with `load_deadline`: what takes longer is computed instead.",
            ),
            [
                Query(
                    quantile(
                        q,
                        of(TIER_OPERATION_SECONDS, CHOSEN, suffix="_bucket"),
                        ("tier", "operation"),
                    ),
                    f"{{{{tier}}}} {{{{operation}}}}, p{q * 100:g}",
                )
                for q in (0.5, 0.99)
            ],
            "s",
        ),
        graph(
            Words(
                "Bytes moved",
                "KV loaded from a tier and stored in it, in bytes a second.",
                "Set it against the network's and the bus's rate.",
            ),
            [
                Query(
                    total(rate(of(TIER_BYTES, CHOSEN)), "tier", "operation"),
                    "{{tier}}, {{operation}}",
                )
            ],
            "Bps",
        ),
        graph(
            Words(
                "Promotions",
                "Chunks in a second that were brought nearer for a prompt that read them.",
                "Steady promotions from the CPU tier are what it is for. If they outnumber the "
                "device's hits, the device is small for the sessions that are active.",
            ),
            [
                Query(
                    total(rate(of(PROMOTIONS, CHOSEN)), "source", "target"),
                    "{{source}} to {{target}}",
                )
            ],
            "short",
        ),
        graph(
            Words(
                "Prefetched chunks",
                "Chunks in a second that came into the CPU tier before a session that waits for a "
                "tool asked for them, and what became of them.",
                "wasted near loaded: lower `eviction.prefetch_share`, or enlarge `cpu_bytes`.",
                "`eviction.prefetch_share` is 0",
            ),
            [Query(total(rate(of(PREFETCHED_CHUNKS, CHOSEN)), "outcome"), "{{outcome}}")],
            "short",
            span=12,
        ),
        graph(
            Words(
                "Ended conversations",
                "Entries in a second of sessions and conversations that are known to be over, and "
                "that a tier evicts before others.",
                "None although agents run: have them say that a session is over (`session_over`).",
            ),
            [Query(total(rate(of(ENDED_ENTRIES, CHOSEN)), "tier"), "{{tier}}")],
            "short",
            span=12,
        ),
        graph(
            Words(
                "Waits for room in the CPU tier",
                "Prompts in a second whose blocks a remote tier holds, by whether there was room: "
                "at_once; waited: in time; and computed instead: late, turned_away (none was to be "
                "expected in time), tier_lost, cut_off.",
                "late and turned_away: enlarge `cpu_bytes`; *CacheScopeNoRoom* fires. waited: how "
                "long is the panel beside this one.",
                "No remote tier",
            ),
            [
                Query(
                    total(rate(of(PROMOTION_WAIT_SECONDS, CHOSEN, suffix="_count")), "outcome"),
                    "{{outcome}}",
                )
            ],
            "short",
            stacking=StackingMode.NORMAL,
            span=12,
        ),
        graph(
            Words(
                "Length of waits for room",
                "How long prompts waited for room in the CPU tier before they read what a remote "
                "tier holds, or were computed. Median and 99th percentile.",
                "At most `cpu_wait`, and `cpu_wait_share` of what computing takes.",
                "No remote tier",
            ),
            [
                Query(
                    quantile(q, of(PROMOTION_WAIT_SECONDS, CHOSEN, suffix="_bucket"), ("outcome",)),
                    f"{{{{outcome}}}}, p{q * 100:g}",
                )
                for q in (0.5, 0.99)
            ],
            "s",
            span=12,
        ),
        graph(
            Words(
                "Queues of remote tiers",
                "Chunks that wait or are under way.",
                "A queue that grows without end says that the store is too slow for the traffic.",
                "No remote tier",
            ),
            [Query(total(of(TIER_QUEUE, CHOSEN), "tier", "queue"), "{{tier}}, {{queue}}")],
            "short",
            span=12,
        ),
        graph(
            Words(
                "Bytes in flight",
                "Bytes queued or under way to and from remote tiers.",
                "At `max_inflight_bytes` further chunks are dropped.",
                "No remote tier",
            ),
            [
                Query(
                    total(of(TIER_INFLIGHT_BYTES, CHOSEN), "tier", "direction"),
                    "{{tier}}, {{direction}}",
                )
            ],
            "bytes",
            span=12,
        ),
    ]
