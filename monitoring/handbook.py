"""The tables of docs/observability.md that are made: metrics, and panels row by row."""

import json
import re
from typing import Any

from monitoring.panels import REMEDY
from vllm_cachescope.metrics import METRICS, Metric

_PART = "<!-- {name}: made by `python -m monitoring` -->\n"
_END = "<!-- end -->\n"


def handbook(text: str, dashboard: str) -> str:
    """Return the text of docs/observability.md with its tables made anew.

    Args:
        text: the text as it is.
        dashboard: the dashboard, as JSON.

    Raises:
        ValueError: if the text has no place for a table.
    """
    panels = json.loads(dashboard)["panels"]
    return _put(_put(text, "metrics", _metrics(panels)), "panels", _panels(panels))


def _put(text: str, name: str, table: str) -> str:
    before, begin, rest = text.partition(_PART.format(name=name))
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"docs/observability.md has no place for {name}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _metrics(panels: list[dict[str, Any]]) -> str:
    rows = ["| metric | labels | what it counts | panels |", "|---|---|---|---|"]
    for metric in METRICS:
        shown = [
            panel["title"]
            for panel in panels
            if any(_uses(target["expr"], metric) for target in panel.get("targets", ()))
        ]
        labels = [f"`{label}`" for label in (*metric.labels, *(["org"] if metric.by_org else []))]
        kind = "" if metric.kind == "counter" else f" ({metric.kind})"
        rows.append(
            f"| `{metric.shown}`{kind} | {', '.join(labels)} | {_cell(metric.help)} | "
            f"{', '.join(shown)} |"
        )
    return "\n".join(rows) + "\n"


def _uses(expression: str, metric: Metric) -> bool:
    suffix = "(?:_bucket|_sum|_count)" if metric.kind == "histogram" else ""
    return re.search(rf"(?<![\w:]){metric.shown}{suffix}(?!\w)", expression) is not None


def _panels(panels: list[dict[str, Any]]) -> str:
    lines = []
    for panel in panels:
        if panel["type"] == "row":
            lines += [
                "",
                f"### {panel['title']}",
                "",
                "| panel | shows | what to do |",
                "|---|---|---|",
            ]
            continue
        description, _, remedy = panel["description"].partition(REMEDY)
        lines.append(f"| {panel['title']} | {_cell(description)} | {_cell(remedy)} |")
    return "\n".join(lines[1:]) + "\n"


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
