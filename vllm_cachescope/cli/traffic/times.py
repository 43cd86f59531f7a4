"""The time of a call, whichever way a log writes it."""

from datetime import datetime

_MAX_SECONDS = 253_402_300_800.0  # the year 10000: no time of day is later


def seconds_of(value: object) -> float | None:
    """Return a timestamp in seconds, whichever unit its size shows it to be in."""
    if isinstance(value, str):
        if value.isascii() and value.isdigit() and len(value) < 20:
            return seconds_of(int(value))
        try:
            return datetime.fromisoformat(value).timestamp()
        except (OverflowError, ValueError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    unit = next((unit for unit in (1e9, 1e6, 1e3) if value > 1e8 * unit), 1.0)
    return in_range(value, unit)


def in_range(value: float, unit: float) -> float | None:
    """Return ``value / unit`` seconds; None if that is not finite or past the year 9999."""
    # An integer of hundreds of digits can be compared with a float, but not made one.
    return value / unit if abs(value) < _MAX_SECONDS * unit else None
