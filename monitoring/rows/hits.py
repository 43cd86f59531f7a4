"""Hits: how much is read, from which tier, in which scope and lifetime."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.panels import Query, Words, graph
from monitoring.queries import CHOSEN, MODELS, of, quantile, rate, ratio, total
from monitoring.recordings import BASELINE, HIT_RATIO
from vllm_cachescope.metrics import HIT_AGE, HIT_TOKENS, PROMPT_TOKENS, QUERY_TOKENS, REQUESTS

_READ = 'outcome=~"read_.*"'


def panels() -> list[timeseries.Panel]:
    """Return the row's panels."""
    asked = total(rate(of(QUERY_TOKENS, CHOSEN)))
    by_tier = total(rate(of(HIT_TOKENS, CHOSEN)), "tier")
    return [
        graph(
            Words(
                "Hit ratio by tier",
                "Share of prompt tokens read, by the tier that had them; the layers add up to the "
                "hit ratio.",
                "A layer that thins while the one below it grows is a tier that gets too small, "
                "or one that is down.",
            ),
            [Query(ratio(by_tier, asked, "ignoring (tier) group_left ()"), "{{tier}}")],
            "percentunit",
            stacking=StackingMode.NORMAL,
            top=1,
        ),
        graph(
            Words(
                "Hit ratio by scope",
                "Share of the tokens of each scope that were read. Tokens that no breakpoint "
                "covers count to the scope of their region.",
                "global and org are prompts that many share: a low ratio there is a prompt that "
                "differs from request to request. session lags behind by each turn's new tokens.",
            ),
            [Query(_share("scope"), "{{scope}}")],
            "percentunit",
            top=1,
        ),
        graph(
            Words(
                "Hit ratio by TTL",
                "Share of the tokens of each TTL class that were read; “none” is what no "
                "breakpoint covers.",
                "If 5m reads far less than 1h, pauses between turns are longer than five minutes: "
                "have clients ask for 1h, or set the region's default.",
            ),
            [Query(_share("ttl"), "{{ttl}}")],
            "percentunit",
            top=1,
        ),
        graph(
            Words(
                "Hit ratio and its baseline",
                "The hit ratio over an hour, and the median of the same hour on the seven days "
                "before. Made by configs/prometheus/rules.yaml.",
                "A gap that opens at once is a release of a client or a tier that is down; one "
                "that opens slowly is a change in traffic, or memory that no longer suffices.",
                "Rules not loaded",
            ),
            [
                Query(f"{HIT_RATIO}{{{MODELS}}}", "{{model_name}}"),
                Query(f"{BASELINE}{{{MODELS}}}", "{{model_name}}, baseline"),
            ],
            "percentunit",
            top=1,
        ),
        graph(
            Words(
                "Prompts by whether they read",
                "Prompts in a second: “read” if any token came from the cache, “created” if none "
                "did and some were put into it, “neither” otherwise.",
                "“neither” is traffic without breakpoints, or prompts shorter than a block: "
                "`cachescope lint` finds such requests.",
            ),
            [Query(total(rate(of(REQUESTS, CHOSEN)), "outcome"), "{{outcome}}")],
            "reqps",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Age at hit",
                "Share of its lifetime that a block had idled for when it was read: median and "
                "90th percentile.",
                "Near 1 a longer TTL would find more; where the 90th percentile is near 0 a "
                "shorter one would do, and free memory.",
            ),
            [
                Query(
                    quantile(q, of(HIT_AGE, CHOSEN, suffix="_bucket"), ("ttl",)),
                    f"{{{{ttl}}}}, p{q * 100:g}",
                )
                for q in (0.5, 0.9)
            ],
            "percentunit",
            top=1,
        ),
    ]


def _share(label: str) -> str:
    return ratio(
        total(rate(of(PROMPT_TOKENS, CHOSEN, _READ)), label),
        total(rate(of(PROMPT_TOKENS, CHOSEN)), label),
    )
