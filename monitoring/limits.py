"""Limits: from which value on something is an alert, and for how long it is looked at."""

from dataclasses import dataclass

HIT_RATIO_DROP = 0.02
"""How far the hit ratio may lie below its baseline."""

LEAST_TOKENS = 10.0
"""Prompt tokens in a second below which a hit ratio says nothing."""

BREAKS_PER_PROMPT = 0.05
"""Share of prompts that may break unexpectedly, for one cause."""

EARLY_SHARE = 0.2
"""Share of the entries that leave a tier which may be last copies whose lifetime is not over."""

QUOTA_SHARE = 0.1
"""Share of the entries that leave a tier which may have to go for their organisation's quota."""

NEIGHBOUR_SHARE = 0.2
"""Share of the entries that leave a tier which may go for one and the same other organisation."""

LATE_SHARE = 0.05
"""Share of the chunks asked of a remote tier that may come late, fail or not be asked for."""

NO_ROOM_SHARE = 0.05
"""Share of the prompts that a remote tier holds which may find no room in the CPU tier in time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long rules look back, and how long something has to last. Durations are Prometheus' own.

    Attributes:
        evaluation: how often rules are evaluated.
        window: what the rates behind alerts are taken over.
        ratio_window: what hit ratios are taken over that are compared with those of other days.
        day: how far apart the hours are whose hit ratios are the baseline, in units of `unit`.
        unit: the unit of ``day``.
        days: how many such hours are looked at.
        least_days: how many of them there have to be, so that there is a baseline.
        hold: how long most things have to last.
        short_hold: how long a tier has to be down.
    """

    evaluation: str = "30s"
    window: str = "15m"
    ratio_window: str = "1h"
    day: int = 1
    unit: str = "d"
    days: int = 7
    least_days: int = 3
    hold: str = "15m"
    short_hold: str = "1m"


SHIPPED = Timing()
"""What configs/prometheus/ has."""
