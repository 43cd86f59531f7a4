"""The dashboard's panels, asked of a Prometheus as Grafana would ask."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.prometheus import Prometheus

DASHBOARD = Path(__file__).parents[1] / "configs" / "grafana" / "cachescope.json"

RATE_INTERVAL = "4s"
"""What Grafana makes of ``$__rate_interval`` for one scrape a second, at the nearest zoom."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one query of a panel came back with.

    Attributes:
        panel: the panel's title.
        expression: the query, with the variables' values in it.
        series: how many series have data.
    """

    panel: str
    expression: str
    series: int


def ask(prometheus: Prometheus, seconds: float, dashboard: Path = DASHBOARD) -> list[Asked]:
    """Put every query of every panel to ``prometheus``.

    Args:
        prometheus: whom to ask.
        seconds: how far back the dashboard looks.
        dashboard: the dashboard's file.

    Raises:
        ValueError: if a query is wrong.
    """
    board = json.loads(dashboard.read_text(encoding="utf-8"))
    values = {"__rate_interval": RATE_INTERVAL, "__range": f"{max(1, round(seconds))}s"}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            values[variable["name"]] = _choice(prometheus, variable, values)
    asked = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = substituted(target["expr"], values)
            if target.get("instant"):
                found = prometheus.query(expression)
            else:
                found = prometheus.query_range(expression, seconds)
            asked.append(Asked(panel["title"], expression, sum(map(_has_data, found))))
    return asked


def expressions(dashboard: Path = DASHBOARD) -> dict[str, list[str]]:
    """Return the queries of each panel, by its title, as they stand in the dashboard."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    return {p["title"]: [t["expr"] for t in p["targets"]] for p in panels if "targets" in p}


def substituted(expression: str, values: dict[str, str]) -> str:
    """Return ``expression`` with the values of Grafana's variables; ``$1`` is PromQL's own."""
    return re.sub(r"\$([A-Za-z_]\w*)", lambda match: values[match[1]], expression)


def _choice(prometheus: Prometheus, variable: dict[str, Any], values: dict[str, str]) -> str:
    """Return what Grafana puts in place of a variable of which all values are chosen one by one.

    Raises:
        ValueError: if there is nothing to choose.
    """
    query = substituted(variable["query"], values)
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    found = prometheus.label_values(match[2], match[1]) if match else []
    if not found:
        raise ValueError(f"{variable['name']}: {query} has no values")
    # What reached no engine is not among an engine's values; "All" has it.
    return str(variable["allValue"]) if variable["name"] == "engine" else "|".join(found)


def _has_data(series: dict[str, Any]) -> bool:
    points = series.get("values") or [series["value"]]
    return any(value != "NaN" for _, value in points)
