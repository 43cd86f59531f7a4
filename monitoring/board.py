"""The Grafana dashboard."""

import json
from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from monitoring.panels import SOURCE
from monitoring.queries import VARIABLES
from monitoring.rows import breaks, costs, evictions, hits, overview, prompts, tenants, tiers
from vllm_cachescope.metrics import TIER_UP

TAG = "vllm"
"""What vLLM's own dashboards carry, and link to each other by."""

_LABELS = {"job": "Job", "model_name": "Model", "instance": "Instance", "engine": "Engine"}

_ROWS: tuple[tuple[str, Callable[[], list[Any]]], ...] = (
    ("Healthy? Saving? What broke it?", overview.panels),
    ("Hits", hits.panels),
    ("Prompts", prompts.panels),
    ("Breaks", breaks.panels),
    ("Evictions and residency", evictions.panels),
    ("Tiers", tiers.panels),
    ("Tenants", tenants.panels),
    ("What caching itself costs", costs.panels),
)


def board(docs: str) -> str:
    """Return the dashboard as JSON.

    Args:
        docs: where the directory ``docs`` is read.
    """
    made = (
        dashboard.Dashboard("vLLM / CacheScope")
        .uid("vllm-cachescope")
        .description("Prompt caching: hit rates, savings, breaks, tiers and tenants.")
        .tags([TAG, "cachescope"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("")
        .link(
            dashboard.DashboardLink("vLLM dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .icon("external link")
            .include_vars(True)
            .keep_time(True)
        )
        .link(
            dashboard.DashboardLink("Runbook")
            .type(models.DashboardLinkType.LINK)
            .url(f"{docs}/observability.md")
            .icon("doc")
            .target_blank(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for place, name in enumerate(VARIABLES):
        made = made.with_variable(_variable(name, VARIABLES[:place]))
    for title, panels in _ROWS:
        made = made.with_row(dashboard.Row(title))
        for panel in panels():
            made = made.with_panel(panel)
    built = made.build()
    for number, panel in enumerate(built.panels or (), 1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _variable(name: str, wider: tuple[str, ...]) -> dashboard.QueryVariable:
    matchers = ", ".join(f'{one}=~"${one}"' for one in wider)
    source = f"{TIER_UP.shown}{{{matchers}}}" if wider else TIER_UP.shown
    return (
        dashboard.QueryVariable(name)
        .label(_LABELS[name])
        .datasource(SOURCE)
        .query(f"label_values({source}, {name})")
        .multi(True)
        .include_all(True)
        # Any value: what reached no engine has none of the listed ones.
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
