"""The overview: is the cache healthy, what does it save, and what broke it?"""

from grafana_foundation_sdk.builders import bargauge, stat

from monitoring.limits import HIT_RATIO_DROP
from monitoring.panels import GREEN, ORANGE, RED, Query, Words, bars, number, thresholds
from monitoring.queries import CHOSEN, MODELS, RANGE, grown, of, rate, ratio, total
from monitoring.recordings import BASELINE, HIT_RATIO
from vllm_cachescope.metrics import (
    HIT_TOKENS,
    INPUT_COST,
    LOST_TOKENS,
    PREFILL_SECONDS_SAVED,
    QUERY_TOKENS,
    REFUSED_PLANS,
    TIER_UP,
    UNEXPLAINED_TOKENS,
)

HIT_RATE = ratio(
    f"({total(rate(of(HIT_TOKENS, CHOSEN)))} or vector(0))",
    total(rate(of(QUERY_TOKENS, CHOSEN))),
)


def panels() -> list[stat.Panel | bargauge.Panel]:
    """Return the row's panels."""
    down = f"count({of(TIER_UP, CHOSEN)} == 0) or vector(0)"
    refused, unexplained = (
        f"count({total(grown(of(metric, CHOSEN), RANGE), 'instance')} > 0) or vector(0)"
        for metric in (REFUSED_PLANS, UNEXPLAINED_TOKENS)
    )
    firing = (
        'count(ALERTS{alertname=~"CacheScope.*", alertstate="firing", job=~"$job"}) or vector(0)'
    )
    # Without the last line a dashboard that gets no metrics at all would call that healthy.
    troubles = (
        f"(({down}) + ({refused}) + ({unexplained}) + ({firing}))"
        f" and on () (count({of(TIER_UP, CHOSEN)}) > 0)"
    )
    paid, unaided = (
        total(f"increase({of(INPUT_COST, CHOSEN, caching)}[{RANGE}])")
        for caching in ('caching="with"', 'caching="without"')
    )
    lost = total(grown(of(LOST_TOKENS, CHOSEN, 'expected="false"'), RANGE), "cause")
    return [
        number(
            Words(
                "Healthy?",
                "“Yes” if every tier is up, no plan was refused, no token is unexplained and no "
                "alert of CacheScope fires. Otherwise the number of these troubles.",
                "Look at *Tiers up* and at the alerts in your Alertmanager; each links to "
                "its runbook.",
                "No engine",
            ),
            troubles,
            "none",
            3,
            thresholds((1, RED)),
            {"0": ("Yes", GREEN)},
        ),
        number(
            Words(
                "Hit ratio",
                "Share of prompt tokens read from the cache instead of computed.",
                "Compare with its baseline beside it. What is lost stands under *What broke it?*",
            ),
            HIT_RATE,
            "percentunit",
            3,
        ),
        number(
            Words(
                "Against its baseline",
                "Lowest hit ratio of a model, less the median of the same hour on the seven days "
                "before. Made by configs/prometheus/rules.yaml.",
                "Below −2 points *CacheScopeHitRatioLow* fires; see its runbook.",
                "No baseline yet",
            ),
            f"min({HIT_RATIO}{{{MODELS}}} - {BASELINE}{{{MODELS}}})",
            "percentunit",
            3,
            thresholds((-HIT_RATIO_DROP, ORANGE), (0, GREEN), base=RED),
        ),
        number(
            Words(
                "Saving?",
                "Share of the input's price that caching saves: reads at 0.1, writes at 1.25 (up "
                "to 5 minutes) or 2, the rest at 1 input token each.",
                "Near or below 0 more is written than ever read: see *Reads per write*, and mark "
                "less, or what is read again.",
            ),
            f"1 - {ratio(paid, unaided)}",
            "percentunit",
            3,
            thresholds((0, ORANGE), (0.1, GREEN), base=RED),
            is_graph=False,
        ),
        number(
            Words(
                "Prefill saved",
                "Time of prefill that reading from the cache saved, over the time shown, at each "
                "engine's own measured rate.",
                "It is what the cache buys: set it against *What caching itself costs*.",
            ),
            total(f"increase({of(PREFILL_SECONDS_SAVED, CHOSEN)}[{RANGE}])"),
            "s",
            3,
            is_graph=False,
        ),
        bars(
            Words(
                "What broke it?",
                "The five causes that lost most tokens over the time shown, without expected ones.",
                "*Breaks by cause, and what to do* has a suggestion for each.",
                "Nothing",
            ),
            Query(f"topk(5, {lost} > 0)", "{{cause}}"),
            "short",
            9,
        ),
    ]
