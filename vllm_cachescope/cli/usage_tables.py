"""Tables of usage for a terminal."""

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_TIMES = ("hour", "day", "week", "month")


_WIDE = (
    *("uncached", "created", "read", "output tokens", "prefill saved"),
    *("evicted by others", "evicted of others"),
)
"""The columns that are left out where not all of them fit."""


def print_usage(console: Console, answer: Mapping[str, Any]) -> None:
    """Print the table of an answer of ``GET /cachescope/usage``."""
    table = usage_table(answer)
    width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    if console.is_terminal:
        console.print(table if width <= console.width else usage_table(answer, _WIDE))
    else:
        # Whatever reads it has no width.
        console.width = max(width, console.width)
        console.print(table)


def usage_table(answer: Mapping[str, Any], without: Collection[str] = ()) -> Table:
    """Return the table of an answer, without the columns named."""
    currency = answer["currency"]
    table = Table(
        title=f"Usage from {_time(answer['since'])} to {_time(answer['until'])}",
        title_justify="left",
        show_footer=bool(answer["by"]),
    )
    total = answer["total"]
    for number, name in enumerate(answer["by"]):
        table.add_column(name, "total" if number == 0 else "", overflow="fold")
    columns = [
        ("requests", _count),
        ("prompt tokens", _count),
        ("uncached", _count),
        ("created", _count),
        ("read", _count),
        ("hit rate", _share),
        ("reads per write", _ratio),
        ("output tokens", _count),
        ("prefill saved", _seconds),
        ("evicted by others", _count),
        ("evicted of others", _count),
    ]
    if currency is not None:
        columns += [
            (f"without, {currency}", _money),
            (f"with, {currency}", _money),
            ("saved", _share),
        ]
    shown = [number for number, (name, _) in enumerate(columns) if name not in without]
    footer = _values(total, currency is not None)
    for number in shown:
        name, show = columns[number]
        table.add_column(name, show(footer[number]), justify="right")
    for row in answer["rows"] if answer["by"] else [total]:
        keys = [_key(name, row[name]) for name in answer["by"]]
        values = _values(row, currency is not None)
        table.add_row(*keys, *(columns[number][1](values[number]) for number in shown))
    return table


def phase_table(answer: Mapping[str, Any]) -> Group:
    """Return the tables of phases of use, one for each model."""
    tables = []
    for one in answer["models"]:
        title = "All models" if one["model"] is None else f"Model {one['model']}"
        table = Table(title=Text(title), title_justify="left")
        table.add_column("phase")
        table.add_column("week")
        for name in ("sessions", "requests", "prompt tokens", "fresh", "hit rate"):
            table.add_column(name, justify="right")
        before = None
        for number, phase in enumerate(one["phases"], 1):
            for week in phase["weeks"]:
                table.add_row(
                    "",
                    _time(week["week"])[:10],
                    _count(week["sessions"]),
                    _count(week["requests"]),
                    _count(week["prompt_tokens"]),
                    _share(week["fresh_share"]),
                    _share(week["hit_rate"]),
                )
            change = (
                "" if before is None else f" ({100 * (phase['hit_rate'] - before):+.1f} points)"
            )
            table.add_row(
                f"{number}{change}",
                f"{len(phase['weeks'])} in all",
                "",
                _count(phase["requests"]),
                _count(phase["prompt_tokens"]),
                _share(phase["fresh_share"]),
                _share(phase["hit_rate"]),
                style="bold",
                end_section=True,
            )
            before = phase["hit_rate"]
        tables.append(table)
    return Group(*tables) if tables else Group("There was no use in this period.")


def _values(row: Mapping[str, Any], with_costs: bool) -> list[Any]:
    values = [
        row["requests"],
        row["prompt_tokens"],
        row["uncached"],
        sum(row["created"].values()),
        sum(row["read"].values()),
        row["hit_rate"],
        row["reads_per_write"],
        row["output_tokens"],
        row["prefill_seconds_saved"],
        row.get("evictions_suffered"),
        row.get("evictions_caused"),
    ]
    costs = [row["cost_without"], row["cost_with"], row["saved_share"]]
    return values + (costs if with_costs else [])


def _key(name: str, value: str) -> Text:
    if name in _TIMES:
        value = _time(value)[: 16 if name == "hour" else 10]
    # What a client chose may hold what steers a terminal.
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value))


def _time(text: str) -> str:
    return text.removesuffix(":00Z").removesuffix("Z").replace("T", " ")


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} s"


def _money(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4f}"
