"""Phases of use: stretches of weeks in which about the same share of the prompts was read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import Connection, func, literal, select

from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.period import format_time, parse_time
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.query import Query, ask
from vllm_cachescope.usage.store import WEEK_S, week_column, week_of
from vllm_cachescope.usage.tables import SESSIONS, USAGE

STEP = 0.05
"""By how much of the hit rate one week must differ from those around it to be a phase of its own; a
smaller difference makes one the longer it lasts."""


@dataclass(frozen=True, slots=True)
class Week:
    """One week of use.

    Attributes:
        at: when it begins, in seconds since the epoch.
        sessions: how many sessions had a request in it. Sessions whose names were dropped in the
            middle of the week, since there were too many, may count twice.
        requests: how many requests it had.
        prompt_tokens: tokens of their prompts.
        read: of these, tokens read.
        uncached: of these, tokens neither read nor created.
    """

    at: int
    sessions: int
    requests: int
    prompt_tokens: int
    read: int
    uncached: int

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that was read."""
        return self.read / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def fresh_share(self) -> float:
        """Share of the prompts' tokens that was neither read nor created."""
        return self.uncached / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the week as plain data for JSON."""
        return {
            "week": format_time(self.at),
            "sessions": self.sessions,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "fresh_share": round(self.fresh_share, 6),
            "hit_rate": round(self.hit_rate, 6),
        }


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of weeks.

    Attributes:
        weeks: those of them that had any use, in order; at least one.
    """

    weeks: tuple[Week, ...]

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that was read."""
        prompts = sum(week.prompt_tokens for week in self.weeks)
        return sum(week.read for week in self.weeks) / prompts if prompts else 0.0

    @property
    def fresh_share(self) -> float:
        """Share of the prompts' tokens that was neither read nor created."""
        prompts = sum(week.prompt_tokens for week in self.weeks)
        return sum(week.uncached for week in self.weeks) / prompts if prompts else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as plain data for JSON."""
        return {
            "since": format_time(self.weeks[0].at),
            "until": format_time(self.weeks[-1].at + WEEK_S),
            "requests": sum(week.requests for week in self.weeks),
            "prompt_tokens": sum(week.prompt_tokens for week in self.weeks),
            "fresh_share": round(self.fresh_share, 6),
            "hit_rate": round(self.hit_rate, 6),
            "weeks": [week.to_dict() for week in self.weeks],
        }


def phases(weeks: Sequence[Week], step: float = STEP) -> list[Phase]:
    """Divide weeks into phases, so that the hit rate within each is as even as it can be for as
    few phases as there can be.

    Of all ways to divide them the one is taken that has the least sum of squared deviations from
    each phase's mean and of ``step`` squared for each phase. Weeks with little traffic weigh less:
    chance has more of a say in them.

    Args:
        weeks: the weeks, in order.
        step: see `STEP`.
    """
    used = [week for week in weeks if week.prompt_tokens]
    if not used:
        return []
    usual = median(week.prompt_tokens for week in used)
    weights = [min(1.0, week.prompt_tokens / usual) for week in used]
    rates = [week.hit_rate for week in used]
    # The best way to divide the first n weeks: what it costs, and where its last phase begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(used) + 1):
        weight = total = squares = 0.0
        options = []
        for start in range(end - 1, -1, -1):
            weight += weights[start]
            total += weights[start] * rates[start]
            squares += weights[start] * rates[start] ** 2
            deviation = squares - total**2 / weight
            options.append((best[start][0] + deviation + step**2, start))
        best.append(min(options))
    made: list[Phase] = []
    end = len(used)
    while end:
        start = best[end][1]
        made.append(Phase(tuple(used[start:end])))
        end = start
    return made[::-1]


def weeks_by_model(
    connection: Connection, query: Query, each_model: bool
) -> dict[str | None, list[Week]]:
    """Return the weeks of a period, by model; under None those of all models together.

    Args:
        connection: to the ledger's database.
        query: the period, and the organisation or the model that is asked for.
        each_model: whether to tell models apart.
    """
    by = ("week", "model") if each_model else ("week",)
    since = week_of(int(query.since))
    asked = Query(since, query.until, by, query.org, None, query.model)
    sessions = _sessions(connection, asked)
    weeks: dict[str | None, list[Week]] = {}
    for row in ask(connection, asked, Prices()):
        key, totals = dict(row.key), row.totals
        model = key.get("model")
        week = Week(
            at=int(parse_time(key["week"], 0.0)),
            sessions=sessions.get((key["week"], model), 0),
            requests=totals.requests or 0,
            prompt_tokens=totals.prompt_tokens,
            read=totals.read_tokens,
            uncached=totals.uncached,
        )
        weeks.setdefault(model, []).append(week)
    return weeks


def _sessions(connection: Connection, query: Query) -> dict[tuple[str, str | None], int]:
    """Return how many sessions each week had, by week and model."""
    first = int(query.since)
    each_model = "model" in query.by
    counts: dict[tuple[str, str | None], int] = {}

    def add(rows: Iterable[Any]) -> None:
        for week, model, sessions in rows:
            key = format_time(int(week)), model if each_model else None
            counts[key] = counts.get(key, 0) + int(sessions)

    # A session is of one organisation: two may choose the same name.
    week = week_column(USAGE.c.hour)
    model = USAGE.c.model if each_model else literal("")
    which = [USAGE.c.hour >= first, USAGE.c.hour < query.until, USAGE.c.session != ""]
    kept = [SESSIONS.c.week >= first, SESSIONS.c.week < query.until]
    if query.org is not None:
        which.append(USAGE.c.org == kept_name(query.org))
        kept.append(SESSIONS.c.org == kept_name(query.org))
    if query.model is not None:
        which.append(USAGE.c.model == kept_name(query.model))
    named = (
        select(week.label("week"), model.label("model"), USAGE.c.org, USAGE.c.session)
        .where(*which)
        .distinct()
        .subquery()
    )
    grouped = select(named.c.week, named.c.model, func.count()).group_by(
        named.c.week, named.c.model
    )
    add(connection.execute(grouped))
    if query.model is not None:
        kept.append(SESSIONS.c.model == kept_name(query.model))
    else:
        kept.append(SESSIONS.c.model != "" if each_model else SESSIONS.c.model == "")
    dropped = select(SESSIONS.c.week, SESSIONS.c.model, func.sum(SESSIONS.c.sessions))
    add(connection.execute(dropped.where(*kept).group_by(SESSIONS.c.week, SESSIONS.c.model)))
    return counts
