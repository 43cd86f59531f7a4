"""The table of what was measured, long and short, and the file with all figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleet.engine import KINDS, Engine
from benchmarks.fleet.measured import Measured
from benchmarks.fleet.row import ONE_REPLICA, Row
from benchmarks.fleet.target import Pair, alike, pairs, verdicts
from benchmarks.harness import Spread, machine

_COLUMNS = (
    *("router", "front end", "chooses", "replicas", "runs", "tokens read", "of prompts"),
    *("first token, p50", "p99", "computed twice", "another tenant's read"),
)

Rows = Sequence[tuple[Row, Measured | str]]
"""The rows; a text in place of what was measured says why it was not."""


def line(row: Row, measured: Measured | str) -> list[str]:
    """Return the cells of a row."""
    router = row.router
    cells = [router.name, row.engine.front_end.value, row.chooses, row.engine.name]
    if router is ONE_REPLICA:
        cells[2] = "–"
    if isinstance(measured, str):
        return [*cells, "0", measured, *[""] * 5]
    across = "–" if measured.across is None else f"{measured.across:,}"
    return [
        *cells,
        str(len(measured.runs)),
        f"{measured.spread(lambda run: run.read).median:,.0f}",
        _share(measured.shares),
        f"{measured.p50_ms:,.0f} ms",
        f"{measured.p99_ms:,.0f} ms",
        f"{measured.spread(lambda run: run.twice).median:,.0f}",
        across,
    ]


def _share(shares: Spread) -> str:
    if shares.count == 1:
        return f"{shares.median:.1%}"
    return f"{shares.median:.1%} ({100 * shares.low:.1f} to {100 * shares.high:.1f})"


def markdown(rows: Rows, about: dict[str, Any]) -> str:
    """Return the table, what stands beside plain vLLM, and what is asked of it, as a page.

    Args:
        rows: the rows.
        about: the load and the state of the code.
    """
    on = machine()
    measured = _measured(rows)
    loads = [run.load_average for one in measured for run in one.runs]
    busy = f"load averages of {min(loads):.0f} to {max(loads):.0f}" if loads else "no row measured"
    calls = max((len(run.ttft_s) for one in measured for run in one.runs), default=0)
    # Dynamo's workers have an engine of their own.
    engines = ", ".join(on["engine"])
    lines = [
        f"{on['cpus']} cores of {on['cpu']}, Python {on['python']}, {engines} (Dynamo's workers: "
        f"0.31.0), {busy}; model `{about['model']}`, {calls} calls "
        f"(`--turns {about['turns']} --pace {about['pace']}`). Of several runs the median, with "
        "the smallest and the largest.",
        "",
        *_grid(_COLUMNS, 5, [line(*row) for row in rows]),
        "",
        *_grid(_AGAINST, 4, [_against(pair) for pair in pairs(measured)]),
        "",
        *_grid(
            ("asked", "found", ""),
            3,
            [[v.asked, v.found, "met" if v.holds else "**missed**"] for v in verdicts(measured)],
        ),
    ]
    return "\n".join(lines) + "\n"


_AGAINST = ("router", "front end", "chooses", "CacheScope", "plain vLLM", "reads", "times")


def _against(pair: Pair) -> list[str]:
    row = pair.ours.row
    return [
        *line(row, "")[:3],
        row.engine.tiers.value,
        _share(pair.plain.shares),
        _share(pair.ours.shares),
        f"{pair.ratio:.3f}" if pair.holds else f"**{pair.ratio:.3f}**",
    ]


def short(rows: Rows) -> str:
    """Return a line for each router: the share of prompts that was read, by the kind of replica.

    Where a router's choices for plain vLLM were replayed, the device alone is shown by these.
    """
    found = {one.row.name: one for one in _measured(rows)}
    lines: dict[str, list[str]] = {}
    for row, _ in rows:
        if row.replays:
            continue
        label = line(row, "")
        name = row.router.name if row.router is ONE_REPLICA else f"{label[0]}, {label[1]}"
        cells = [name, label[2]]
        for plugin, tiers in KINDS:
            engine = Engine(row.engine.front_end, plugin, tiers)
            anew, again = (
                found.get(Row(row.router, engine, replays).name) for replays in (False, True)
            )
            one = alike(anew, again) if anew and again and not plugin else again or anew
            cells.append("–" if one is None else f"{one.shares.median:.1%}")
        lines.setdefault(" ".join(cells[:2]), cells)
    return "\n".join(_grid(_SHORT, 2, list(lines.values()))) + "\n"


_SHORT = ("behind", "chosen", "plain vLLM", "device only", "+ CPU", "+ Redis")


def _grid(columns: Sequence[str], texts: int, lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    rule = ["---"] * texts + ["--:"] * (len(columns) - texts)
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(rule)}|",
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]


def _measured(rows: Rows) -> list[Measured]:
    return [one for _, one in rows if isinstance(one, Measured)]


def write(directory: Path, rows: Rows, about: dict[str, Any]) -> Path:
    """Write ``fleet.md`` and ``fleet.json``; return the first."""
    directory.mkdir(parents=True, exist_ok=True)
    judged = verdicts(_measured(rows))
    data = {
        "machine": machine(),
        "about": about,
        "rows": [_as_dict(*row) for row in rows],
        "targets": [{"asked": v.asked, "found": v.found, "holds": v.holds} for v in judged],
    }
    text = json.dumps(data, indent=2, ensure_ascii=False)
    (directory / "fleet.json").write_text(f"{text}\n")
    page = directory / "fleet.md"
    page.write_text(markdown(rows, about))
    return page


def _as_dict(row: Row, measured: Measured | str) -> dict[str, Any]:
    if isinstance(measured, str):
        return {"row": row.name, "not run": measured}
    return {
        **{"row": row.name, "router": row.router.name, "policy": row.router.policy},
        **{"replicas": row.replicas, "front_end": row.engine.front_end},
        **{"engine": row.engine.name, "runs": [run.as_dict() for run in measured.runs]},
    }


def quote(page: Path, text: str) -> None:
    """Put a text between the two marks of a page.

    Raises:
        ValueError: if the page has no such marks.
    """
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text}{end}{after}")
