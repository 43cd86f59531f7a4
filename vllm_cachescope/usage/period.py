"""Periods of time as people ask for them: ``7d``, ``2026-11-01``, ``2026-11-01T12:00Z``."""

import math
from datetime import UTC, datetime

from vllm_cachescope.durations import parse_duration

ALLOWED = (
    "allowed: a duration before now as in 7d, a date or time of ISO 8601 (UTC unless it says "
    "otherwise) as in 2026-11-01, seconds since the epoch, or now"
)


def parse_time(text: str, now: float) -> float:
    """Return the time that ``text`` means, in seconds since the epoch.

    Args:
        text: what is allowed: see `ALLOWED`.
        now: the time in seconds since the epoch.

    Raises:
        ValueError: if it is none of these.
    """
    if text == "now":
        return now
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    try:
        at = float(text)
    except ValueError:
        at = _iso(text)
    # Of what calendars have: dates are printed.
    if not math.isfinite(at) or not 0 <= at < 253402300800:
        raise ValueError(f"{text!r} is no time; {ALLOWED}")
    return at


def _iso(text: str) -> float:
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time; {ALLOWED}") from None


def format_time(at: float) -> str:
    """Return seconds since the epoch as a time of ISO 8601, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def month_of(at: int) -> int:
    """Return the beginning of the month of ``at``, in UTC; both in seconds since the epoch."""
    day = datetime.fromtimestamp(at, UTC)
    return int(datetime(day.year, day.month, 1, tzinfo=UTC).timestamp())
