"""Durations as people write them: ``"5m"``, ``"1h"``, ``"90s"``, ``"250ms"``."""

import re
from functools import cache

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+)(s|m|h|d)")


def parse_duration(text: str) -> int:
    """Return the seconds in a duration such as ``"5m"``.

    Raises:
        ValueError: if ``text`` is not a positive whole number followed by s, m, h or d.
    """
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f"{text!r} is not a duration: write a positive whole number and s, m, h or d, as in 5m"
        )
    return int(match[1]) * _UNITS[match[2]]


def parse_wait(text: str) -> float:
    """Return the seconds in a duration that may be shorter than one, such as ``"250ms"``.

    Raises:
        ValueError: if ``text`` is not a positive whole number followed by ms, s, m, h or d.
    """
    if text.endswith("ms") and text[:-2].isascii() and text[:-2].isdigit() and int(text[:-2]):
        return int(text[:-2]) / 1000
    try:
        return float(parse_duration(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a duration: write a positive whole number and ms, s, m, h or d, as "
            "in '250ms'"
        ) from None


def format_wait(seconds: float) -> str:
    """Return a wait for people to read: ``"80 ms"``, from a second on ``"1.2 s"``."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


@cache
def format_duration(seconds: int) -> str:
    """Return the shortest exact spelling of ``seconds``: 300 is ``"5m"``, 90 is ``"90s"``."""
    for unit in ("d", "h", "m"):
        if seconds % _UNITS[unit] == 0 and (unit != "d" or seconds > _UNITS["d"]):
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"
