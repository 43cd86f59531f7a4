"""A marking: where a client sets breakpoints, and for how long each lets a prefix live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from vllm_cachescope.cli.report.prompt_view import PLACES, Place
from vllm_cachescope.durations import format_duration
from vllm_cachescope.usage.record import FIVE_MINUTES_S, ONE_HOUR_S

MAX_MARKS = 4
"""Breakpoints in a request, at most: Anthropic's rule, and this server's."""


@dataclass(frozen=True, slots=True)
class Marking:
    """Where to put breakpoints, and with which lifetimes.

    Attributes:
        marks: ``(place, TTL in seconds)``, in the order of places. A place that a prompt has not is
            left out there.
        as_recorded: whether the breakpoints are those that each prompt was recorded with, instead.
    """

    marks: tuple[tuple[Place, int], ...]
    as_recorded: bool = False

    def __str__(self) -> str:
        """Say it in words, as in ``system 1h, end 5m``."""
        if self.as_recorded:
            return "as recorded"
        named = [f"{place} {format_duration(ttl_s)}" for place, ttl_s in self.marks]
        return ", ".join(named) or "no breakpoints"


def all_markings() -> tuple[Marking, ...]:
    """Return every marking of at most `MAX_MARKS` breakpoints, the simplest first: lifetimes of
    five minutes or an hour, the longer ones in front, as Anthropic asks for."""
    return tuple(Marking(marks) for n in range(MAX_MARKS + 1) for marks in _of_length(n))


def _of_length(n: int) -> Iterator[tuple[tuple[Place, int], ...]]:
    for places in combinations(PLACES, n):
        for long in range(n + 1):
            yield tuple(zip(places, _ttls(long, n - long), strict=True))


def _ttls(long: int, short: int) -> Sequence[int]:
    return [ONE_HOUR_S] * long + [FIVE_MINUTES_S] * short
