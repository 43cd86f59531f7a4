"""The summary of all results: a Markdown page with every figure, and plots beside it."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.numbers import shown

SUMMARY = "summary.md"

HEADLINES = (
    ("overhead", "throughput, plugin over plain", "Throughput of device hits, over plain vLLM"),
    ("overhead", "added to its first token, plugin", "Added to the first token of a device hit"),
    ("cpu_tier", "20,000 tokens: CPU tier over device cache", "CPU tier, over a device hit"),
    ("cpu_tier", "20,000 tokens: computed over CPU tier", "Computing, over the CPU tier"),
    ("remote_tier", "20,000 tokens: Redis over LMCache from Redis", "Redis, over LMCache's"),
    ("remote_tier", "20,000 tokens: computed over Redis", "Computing, over Redis"),
    (
        "agent_replay",
        "tokens computed: the best peer over CacheScope, exclusive",
        "Tokens computed by the best peer under pressure, over ours",
    ),
    (
        "agent_replay",
        "first token, median: the best peer over CacheScope, exclusive",
        "Its first token, median, over ours",
    ),
)
"""The figures that README shows: benchmark, figure, and what it says there."""

_MET = {True: "met", False: "**missed**", None: ""}


def write(directory: Path) -> Path:
    """Write the summary of the results in ``directory`` beside them; return the page."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    parts = ["# Results\n"]
    if results:
        parts.append(_machine([result["machine"] for result in results]))
        parts.append(in_short(results))
    for result in results:
        plots = _plots(result, directory)
        parts.append(_section(result, plots))
    page = directory / SUMMARY
    page.write_text("\n".join(parts))
    return page


def in_short(results: list[dict[str, Any]]) -> str:
    """Return the table of README: those of `HEADLINES` that were measured."""
    found = {(one["name"], of["name"]): of for one in results for of in one["figures"]}
    lines = ["| | median | smallest to largest | asked |", "|---|--:|--:|---|"]
    for benchmark, name, label in HEADLINES:
        if (figure := found.get((benchmark, name))) is None:
            continue
        spread = figure["spread"]
        median = f"{shown(spread['median'])} {figure['unit']}"
        between = f"{shown(spread['low'])} to {shown(spread['high'])} ({spread['count']})"
        verdict = ", ".join(filter(None, (figure["target"], _MET[figure["holds"]])))
        lines.append(f"| {label} (`{benchmark}`) | {median} | {between} | {verdict} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _machine(machines: list[dict[str, Any]]) -> str:
    one = machines[-1]
    loads = [machine["load_average"] for machine in machines]
    engines = ", ".join(one["engine"])
    return (
        f"Measured on {one['cpus']} cores of {one['cpu']}, Python {one['python']}, {engines}; load "
        f"average at the ends of the benchmarks {min(loads)} to {max(loads)}.\n"
    )


def _section(result: dict[str, Any], plots: list[tuple[str, str]]) -> str:
    lines = [f"## {result['name']}\n"]
    if result["quick"]:
        lines.append("With too few pairs to be quoted.\n")
    lines += [f"![{unit}]({name})\n" for unit, name in plots]
    lines += ["| figure | median | min … max | n | target | |", "|---|--:|--:|--:|---|---|"]
    for figure in result["figures"]:
        spread = figure["spread"]
        cells = [
            figure["name"].replace("|", "\\|"),
            f"{shown(spread['median'])} {figure['unit']}",
            f"{shown(spread['low'])} … {shown(spread['high'])}",
            str(spread["count"]),
            figure["target"],
            _MET[figure["holds"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plots(result: dict[str, Any], directory: Path) -> list[tuple[str, str]]:
    """Draw the figures of each unit; return units and names of files."""
    drawn = []
    by_unit: dict[str, list[dict[str, Any]]] = {}
    for figure in result["figures"]:
        by_unit.setdefault(figure["unit"], []).append(figure)
    for number, (unit, figures) in enumerate(by_unit.items()):
        if len(figures) < 2:
            continue
        medians = [figure["spread"]["median"] for figure in figures]
        below = [m - figure["spread"]["low"] for m, figure in zip(medians, figures, strict=True)]
        above = [figure["spread"]["high"] - m for m, figure in zip(medians, figures, strict=True)]
        canvas, axes = pyplot.subplots(figsize=(8, 0.6 + 0.3 * len(figures)))
        axes.barh([figure["name"] for figure in figures], medians, xerr=[below, above])
        axes.invert_yaxis()
        axes.set_xlabel(unit or "count")
        name = f"{result['name']}-{number}.png"
        canvas.savefig(directory / name, bbox_inches="tight", dpi=100)
        pyplot.close(canvas)
        drawn.append((unit or "count", name))
    return drawn
