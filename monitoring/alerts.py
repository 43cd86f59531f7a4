"""Alerts: what an operator is called for, and where the way out is written."""

from dataclasses import dataclass
from typing import Any

from monitoring import limits
from monitoring.limits import Timing
from monitoring.queries import grown, of, rate, ratio, smallest, total
from monitoring.recordings import BASELINE, BREAK_RATIO, BY, HIT_RATIO, QUERY_RATE
from vllm_cachescope.metrics import (
    EARLY_EVICTIONS,
    EVICTIONS,
    ORG,
    ORG_EVICTIONS,
    PROMOTION_WAIT_SECONDS,
    REFUSED_PLANS,
    TIER_KEYS,
    TIER_UP,
    UNEXPLAINED_TOKENS,
)

_ENGINE = ("job", "model_name", "instance", "engine")
_TIER = (*BY, "tier")


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert.

    Attributes:
        name: its name.
        expression: PromQL that has a result while something is wrong.
        hold: how long that has to last.
        severity: ``critical`` calls somebody, ``warning`` can wait for the morning.
        summary: what is wrong, in a line.
        description: what that means, with the figures.
    """

    name: str
    expression: str
    hold: str
    severity: str
    summary: str
    description: str

    def rule(self, docs: str) -> dict[str, Any]:
        """Return the alert as Prometheus' own rule.

        Args:
            docs: where the directory ``docs`` is read.
        """
        return {
            "alert": self.name,
            "expr": self.expression,
            **({"for": self.hold} if self.hold else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{docs}/observability.md#{self.name.lower()}",
            },
        }


def alerts(timing: Timing) -> list[Alert]:
    """Return all alerts."""
    window = timing.window
    left = total(rate(of(EVICTIONS), window), *_TIER)
    early = total(
        rate(of(EARLY_EVICTIONS, 'reason="capacity"', 'last_copy="true"'), window), *_TIER
    )
    pressed = total(rate(of(EVICTIONS, 'reason="quota"'), window), *_TIER)
    pushed = total(rate(of(ORG_EVICTIONS, 'part="caused"', 'org!=""'), window), *_TIER, ORG)
    matched = f"on ({', '.join(_TIER)}) group_left ()"
    asked = total(rate(of(TIER_KEYS, 'operation=~"lookup|load"'), window), *_TIER)
    late = total(
        rate(of(TIER_KEYS, 'operation=~"lookup|load"', 'outcome=~"late|dropped|failed"'), window),
        *_TIER,
    )
    waits = total(rate(of(PROMOTION_WAIT_SECONDS, suffix="_count"), window), *BY)
    no_room = total(
        rate(of(PROMOTION_WAIT_SECONDS, 'outcome=~"late|turned_away"', suffix="_count"), window),
        *BY,
    )
    return [
        Alert(
            "CacheScopeHitRatioLow",
            f"{HIT_RATIO} < {BASELINE} - {limits.HIT_RATIO_DROP} "
            f"and {QUERY_RATE} > {limits.LEAST_TOKENS:g}",
            timing.hold,
            "warning",
            "{{ $labels.model_name }} reads less from the cache than it does at this hour",
            "The hit ratio of {{ $labels.model_name }} is {{ $value | humanizePercentage }}. That "
            f"is more than {limits.HIT_RATIO_DROP * 100:g} points below the median of this hour "
            f"on the {timing.days} days before.",
        ),
        Alert(
            "CacheScopeBreaks",
            f"{BREAK_RATIO} > {limits.BREAKS_PER_PROMPT}",
            timing.hold,
            "warning",
            "Prompts for {{ $labels.model_name }} break their prefix: {{ $labels.cause }}",
            "{{ $value | humanizePercentage }} of the prompts could not read what an earlier "
            "request of their session had left, because of {{ $labels.cause }} (region: "
            "{{ $labels.region }}). GET /cachescope/breaks lists them with what to do.",
        ),
        Alert(
            "CacheScopeTierDown",
            f"{smallest(of(TIER_UP), *_ENGINE, 'tier')} == 0",
            timing.short_hold,
            "critical",
            "The tier {{ $labels.tier }} of {{ $labels.instance }} is down",
            "Engine {{ $labels.engine }} of {{ $labels.instance }} ({{ $labels.model_name }}) gets "
            "no answer from {{ $labels.tier }}. Requests go on; what only this tier has is "
            "computed again.",
        ),
        Alert(
            "CacheScopeChurn",
            f"{ratio(early, left)} > {limits.EARLY_SHARE}",
            timing.hold,
            "warning",
            "The tier {{ $labels.tier }} of {{ $labels.model_name }} is too small for its "
            "lifetimes",
            "{{ $value | humanizePercentage }} of what leaves the tier {{ $labels.tier }} is the "
            "last copy of an entry whose lifetime is not over, and goes for want of room.",
        ),
        Alert(
            "CacheScopeQuotaPressure",
            f"{ratio(pressed, left)} > {limits.QUOTA_SHARE}",
            timing.hold,
            "warning",
            "An organisation presses against its quota of {{ $labels.tier }}",
            "{{ $value | humanizePercentage }} of what leaves the tier {{ $labels.tier }} of "
            "{{ $labels.model_name }} goes because its organisation is over its quota.",
        ),
        Alert(
            "CacheScopeNoisyNeighbour",
            f"{ratio(pushed, left, matched)} > {limits.NEIGHBOUR_SHARE}",
            timing.hold,
            "warning",
            "{{ $labels.org }} pushes others out of the tier {{ $labels.tier }}",
            "{{ $value | humanizePercentage }} of what leaves the tier {{ $labels.tier }} of "
            "{{ $labels.model_name }} goes before its time because {{ $labels.org }} needs the "
            "room. A quota would have it evict its own.",
        ),
        Alert(
            "CacheScopeTierLate",
            f"{ratio(late, asked)} > {limits.LATE_SHARE}",
            timing.hold,
            "warning",
            "The tier {{ $labels.tier }} of {{ $labels.model_name }} answers too late",
            "{{ $value | humanizePercentage }} of the chunks asked of {{ $labels.tier }} came "
            "after the deadline, failed, or were not asked for because the queue was full.",
        ),
        Alert(
            "CacheScopeNoRoom",
            f"{ratio(no_room, waits)} > {limits.NO_ROOM_SHARE}",
            timing.hold,
            "warning",
            "The CPU tier of {{ $labels.model_name }} is too small for those who come back",
            "{{ $value | humanizePercentage }} of the prompts that a remote tier holds found no "
            "room in the CPU tier in time and were computed again. Enlarge cpu_bytes.",
        ),
        Alert(
            "CacheScopeRefusedPlans",
            f"{total(grown(of(REFUSED_PLANS), window), *_ENGINE)} > 0",
            "",
            "critical",
            "Plans reach {{ $labels.instance }} that were not made with its secret",
            "{{ $value | humanize }} prompts came with a plan that is not genuine. They were "
            "answered and share nothing. Either a client forges plans, or the API server and the "
            "engine have different secrets.",
        ),
        Alert(
            "CacheScopeUnexplainedTokens",
            f"{total(grown(of(UNEXPLAINED_TOKENS), window), *BY, 'instance')} > 0",
            "",
            "warning",
            "{{ $labels.instance }} lost cached tokens and cannot say why",
            "{{ $value | humanize }} tokens that had been cached were not there, and no tier knows "
            "why. That is a bug in CacheScope.",
        ),
    ]
