"""Recording rules: ratios that alerts and the dashboard compare over days."""

from collections.abc import Iterator
from typing import Any

from monitoring.limits import Timing
from monitoring.queries import grown, of, rate, ratio, total
from vllm_cachescope.metrics import BREAKS, HIT_TOKENS, QUERY_TOKENS, REQUESTS

QUERY_RATE = "job_model:cachescope_query_tokens:rate"
HIT_RATIO = "job_model:cachescope_hit_ratio:ratio"
EARLIER = "job_model_day:cachescope_hit_ratio:ratio"
BASELINE = "job_model:cachescope_hit_ratio:baseline"
BREAK_RATIO = "job_model_cause:cachescope_breaks:ratio"

BY = ("job", "model_name")
"""What ratios are told apart by: replicas of one model are one service."""


def recordings(timing: Timing) -> list[dict[str, Any]]:
    """Return the recording rules, each as Prometheus' own rule."""
    asked = total(rate(of(QUERY_TOKENS), timing.ratio_window), *BY)
    read = total(rate(of(HIT_TOKENS), timing.ratio_window), *BY)
    # Where nothing was ever read there is no series of hits, and the ratio is 0 all the same.
    read_or_none = f"({read} or {asked} * 0)"
    breaks = total(grown(of(BREAKS, 'expected="false"'), timing.window), *BY, "cause", "region")
    prompts = total(grown(of(REQUESTS), timing.window), *BY)
    return [
        {"record": QUERY_RATE, "expr": asked},
        {"record": HIT_RATIO, "expr": ratio(read_or_none, asked)},
        *_earlier(timing),
        {
            "record": BASELINE,
            # The median, so that one bad day does not become what is usual.
            "expr": f"quantile without (day) (0.5, {EARLIER}) "
            f"and (count without (day) ({EARLIER}) >= {timing.least_days})",
        },
        {
            "record": BREAK_RATIO,
            "expr": ratio(breaks, prompts, f"on ({', '.join(BY)}) group_left ()"),
        },
    ]


def _earlier(timing: Timing) -> Iterator[dict[str, Any]]:
    """Yield rules for the hit ratio at this hour on the days before."""
    for n in range(1, timing.days + 1):
        ago = f"{timing.day * n}{timing.unit}"
        yield {
            "record": EARLIER,
            "expr": f"{HIT_RATIO} offset {ago}",
            "labels": {"day": f"-{n}"},
        }
