"""The table of what was measured, and the file with all figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleet.row import ONE_REPLICA, Measured, Row
from benchmarks.fleet.target import Verdict
from benchmarks.harness import machine

_COLUMNS = (
    *("router", "front end", "chooses", "replicas", "tokens read", "of prompts"),
    *("first token, p50", "p99", "computed twice", "another tenant's read"),
)


def line(row: Row, measured: Measured | str) -> list[str]:
    """Return the cells of a row; a text in place of what was measured says why it was not."""
    router = row.router
    cells = [router.name, row.engine.front_end.value, row.chooses, row.engine.name]
    if router is ONE_REPLICA:
        cells[2] = "–"
    if isinstance(measured, str):
        return [*cells, measured, *[""] * 5]
    across = "–" if measured.across is None else f"{measured.across:,}"
    return [
        *cells,
        f"{measured.outcome.read:,}",
        f"{measured.share:.1%}",
        f"{measured.p50_ms:,.0f} ms",
        f"{measured.p99_ms:,.0f} ms",
        f"{measured.twice:,}",
        across,
    ]


def markdown(rows: Sequence[tuple[Row, Measured | str]], verdicts: Sequence[Verdict]) -> str:
    """Return the table and what is asked of it as a page."""
    about = machine()
    # Dynamo's workers have an engine of their own.
    engines = ", ".join(about["engine"])
    lines = [
        f"{about['cpus']} cores of {about['cpu']}, Python {about['python']}, {engines}; load "
        f"average at the end {about['load_average']}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(line(*row))} |" for row in rows),
        "",
        "| asked | found | |",
        "|---|---|---|",
        *(f"| {v.asked} | {v.found} | {'met' if v.holds else '**missed**'} |" for v in verdicts),
    ]
    return "\n".join(lines) + "\n"


def write(
    directory: Path,
    rows: Sequence[tuple[Row, Measured | str]],
    verdicts: Sequence[Verdict],
    load: dict[str, Any],
) -> Path:
    """Write ``fleet.md`` and ``fleet.json``; return the first."""
    directory.mkdir(parents=True, exist_ok=True)
    data = {
        "machine": machine(),
        "load": load,
        "rows": [
            {"row": row.name, "not run": measured}
            if isinstance(measured, str)
            else measured.as_dict()
            for row, measured in rows
        ],
        "targets": [{"asked": v.asked, "found": v.found, "holds": v.holds} for v in verdicts],
    }
    text = json.dumps(data, indent=2, ensure_ascii=False)
    (directory / "fleet.json").write_text(f"{text}\n")
    page = directory / "fleet.md"
    page.write_text(markdown(rows, verdicts))
    return page
