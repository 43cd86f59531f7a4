"""The tables of `cachescope report` on a console."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_cachescope.cli.console import printable
from vllm_cachescope.cli.report import summary as ways
from vllm_cachescope.cli.report.summary import agent_name, ratio

_SESSIONS, _LINEAGES, _GROUPS, _TOP, _AGENTS = 5, 8, 12, 8, 12

_WAYS = {
    ways.WITHOUT: "without caching",
    ways.AS_RECORDED: "as recorded",
    ways.FIVE_MINUTES: "all at 5m",
    ways.ONE_HOUR: "all at 1h",
    ways.UNIFORM: "best for all",
    ways.BEST: "best mix",
}


def render(report: Mapping[str, Any], console: Console) -> None:
    """Print a summary, as `summary.summarise` returns it."""
    calls, tokens, shared = (report[key] for key in ("calls", "tokens", "shared_tokens"))
    console.print(
        f"{calls:,} calls, {tokens:,} prompt tokens, {_percent(shared, tokens)} of them shared "
        f"with earlier calls; counted by {report['tokenizer']}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if not calls:
        return
    if measured := report["measured"]:
        share = _percent(measured["read"], measured["tokens"])
        console.print(
            f"Measured where responses tell it: {measured['read']:,} of {measured['tokens']:,} "
            f"tokens read ({share}).",
            soft_wrap=True,
            highlight=False,
        )
    if untimed := report["untimed_calls"]:
        console.print(f"{untimed:,} calls tell no time: see --gap.", highlight=False)
    _render_sessions(report, console)
    _render_breaks(report["breaks"], console)
    _render_costs(report, console)
    _render_elsewhere(report["elsewhere"], tokens, console)


def _render_sessions(report: Mapping[str, Any], console: Console) -> None:
    agents = {one["agent"]: one for one in report["markings"]["agents"]}
    for session in report["sessions"][:_SESSIONS]:
        title = f"Session {session['session']}: {session['calls']:,} calls"
        phases = _table(
            f"{title}, phases", ["phase", "calls"], ["tokens", "shared"], console, ["began"]
        )
        for i, phase in enumerate(session["phases"], 1):
            phases.add_row(
                str(i),
                f"{phase['first_call']:,}–{phase['last_call']:,}",
                f"{phase['tokens']:,}",
                f"{phase['share']:.2%}",
                phase["began"],
            )
        console.print(phases)
        if session["lineage_count"] < 2:
            continue
        columns = ["calls", "tokens", "shared", "breaks", "missed"]
        lineages = _table(f"{title}, lineages", ["lineage", "agent"], columns, console)
        for one in session["lineages"][:_LINEAGES]:
            lineages.add_row(
                str(one["lineage"]),
                _text(agent_name(agents[one["agent"]])),
                f"{one['calls']:,}",
                f"{one['tokens']:,}",
                _percent(one["shared_tokens"], one["tokens"]),
                f"{one['breaks']:,}",
                f"{one['missed_tokens']:,}",
            )
        console.print(lineages)
        _more(session["lineage_count"] - _LINEAGES, "lineages", console)
    _more(report["session_count"] - _SESSIONS, "sessions", console)


def _render_breaks(breaks: Mapping[str, Any], console: Console) -> None:
    if not breaks["calls"]:
        console.print("No prefix broke.")
        return
    title = f"{breaks['calls']:,} breaks, {breaks['missed_tokens']:,} tokens missed"
    table = _table(title, ["rule", "where"], ["calls", "missed"], console, ["suggestion"])
    for group in breaks["groups"][:_GROUPS]:
        table.add_row(
            Text(
                f"{group['code']} {group['rule']}",
                style="bold red" if group["level"] == "warning" else "yellow",
            ),
            _text(group["place"]),
            f"{group['calls']:,}",
            f"{group['missed_tokens']:,}",
            _text(group["suggestion"]),
        )
    console.print(table)
    _more(len(breaks["groups"]) - _GROUPS, "kinds of breaks", console)


def _render_costs(report: Mapping[str, Any], console: Console) -> None:
    costs, priced = report["costs"], not report["unpriced_models"]
    money = report["currency"] if priced else "cost in tokens"
    columns = ["read", "new, 5m", "new, 1h", "uncached", money, "saved"]
    table = _table("Cost of the prompts", ["prompts"], columns, console)
    table.columns[0].no_wrap = True
    for way, cost in costs.items():
        table.add_row(
            _WAYS[way],
            *(_count(cost[key]) for key in ("read", "written_5m", "written_1h", "uncached")),
            f"{cost['cost']:,.3f}" if priced else _count(cost["equivalents"]),
            "" if way == ways.WITHOUT or cost["saved"] is None else f"{cost['saved']:.1%}",
        )
    console.print(table)
    if report["unpriced_models"]:
        names = ", ".join(printable(name) or "(no name)" for name in report["unpriced_models"][:5])
        text = f"No price is known of: {names}. Give --prices or --price."
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    _render_best(report, console)


def _render_best(report: Mapping[str, Any], console: Console) -> None:
    costs, markings = report["costs"], report["markings"]
    priced = not report["unpriced_models"]
    key = "cost" if priced else "equivalents"
    now = ways.AS_RECORDED if ways.AS_RECORDED in costs else ways.FIVE_MINUTES
    more = costs[now][key] - costs[ways.BEST][key]
    unit = report["currency"] if priced else "input tokens"
    amount = f"{more:,.3f} {unit}" if priced else f"{more:,.0f} {unit}"
    share = f" ({more / costs[now][key]:.1%})" if costs[now][key] else ""
    console.print(
        f"Best for all: {markings['uniform']}. The best mix would save {amount}{share} of what "
        f"prompts cost {_WAYS[now]}. It reads {in_words(costs[ways.BEST])}.",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("Best mix", ["agent"], ["calls", "tokens", "read"], console, ["breakpoints"])
    agents = sorted(markings["agents"], key=lambda one: -one["tokens"])
    for one in agents[:_AGENTS]:
        table.add_row(
            _text(agent_name(one)),
            f"{one['calls']:,}",
            f"{one['tokens']:,}",
            _percent(one["read"], one["tokens"]),
            one["breakpoints"],
        )
    console.print(table)
    _more(len(agents) - _AGENTS, "agents", console)


def in_words(cost: Mapping[str, Any]) -> str:
    """Return how much is read for what is not, as in ``1,224 to 1``, with both counts."""
    fresh = cost["written_5m"] + cost["written_1h"] + cost["uncached"]
    per = ratio(cost["read"], fresh)
    if per is None:
        return "nothing"
    told = f"{per:,.0f} to 1" if per >= 10 else f"{per:.1f} to 1"
    return f"{cost['read']:,} tokens and leaves {fresh:,} fresh, {told}"


def _render_elsewhere(elsewhere: Mapping[str, Any], tokens: int, console: Console) -> None:
    repeated = elsewhere["tokens"]
    if not repeated:
        return
    scopes = ", ".join(
        f"{count:,} {_SCOPES[scope]}" for scope, count in elsewhere["by_scope"].items()
    )
    console.print(
        f"A cache that reuses repeated content at other positions could read {repeated:,} tokens "
        f"besides ({_percent(repeated, tokens)}): {scopes}.",
        highlight=False,
        soft_wrap=True,
    )
    for title, key in (("content", "by_tool"), ("file", "by_file")):
        counts = list(elsewhere[key].items())
        if not counts:
            continue
        table = _table(f"Repeated, by {title}", [title], ["tokens"], console)
        for name, count in counts[:_TOP]:
            table.add_row(_text(name), f"{count:,}")
        console.print(table)
        _more(len(counts) - _TOP, f"{title}s", console)


_SCOPES = {
    "prompt": "twice in one prompt",
    "session": "from the same session",
    "org": "from other sessions",
}


def _table(
    title: str,
    first: Sequence[str],
    numbers: Sequence[str],
    console: Console,
    last: Iterable[str] = (),
) -> Table:
    """Return a table without rows, and print its title, which a narrow table would wrap."""
    console.print(_text(title, "bold"), soft_wrap=True)
    table = Table()
    for name in first:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name, overflow="fold")
    return table


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _more(count: int, what: str, console: Console) -> None:
    if count > 0:
        console.print(f"and {count:,} more {what}", style="dim", highlight=False)


def _count(number: float) -> str:
    """Return a count, in millions where it would take much room."""
    return f"{number:,.0f}" if number < 1e7 else f"{number / 1e6:,.1f}M"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
