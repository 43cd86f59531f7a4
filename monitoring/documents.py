"""The documents that are made: the dashboard, the rules, both for Kubernetes, and the tables of
docs/observability.md."""

from pathlib import Path
from typing import Any

import promql_parser
import yaml

from monitoring.alerts import alerts
from monitoring.board import board
from monitoring.handbook import handbook
from monitoring.limits import SHIPPED, Timing
from monitoring.recordings import recordings

ROOT = Path(__file__).parents[1]

HANDBOOK = "docs/observability.md"

DOCS = "docs"
"""Where the directory docs/ is read, unless another place is given."""

_MADE = "# Made by `python -m monitoring`; change monitoring/ and run it again.\n"


def documents(docs: str = DOCS, timing: Timing = SHIPPED) -> dict[str, str]:
    """Return the texts of all files that are made, by their paths in the repository.

    Args:
        docs: where the directory docs/ is read: runbooks are linked there.
        timing: the windows of the rules.
    """
    dashboard = board(docs)
    rules = _group("cachescope", recordings(timing), timing)
    warnings = _group("cachescope-alerts", [one.rule(docs) for one in alerts(timing)], timing)
    return {
        "configs/grafana/cachescope.json": dashboard,
        HANDBOOK: handbook((ROOT / HANDBOOK).read_text(encoding="utf-8"), dashboard),
        "configs/prometheus/rules.yaml": _yaml({"groups": [rules]}),
        "configs/prometheus/alerts.yaml": _yaml({"groups": [warnings]}),
        "configs/kubernetes/prometheusrule.yaml": _yaml(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": {"name": "cachescope"},
                "spec": {"groups": [rules, warnings]},
            }
        ),
        "configs/kubernetes/dashboard.yaml": _yaml(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": "cachescope-dashboard",
                    # What the sidecar of Grafana's chart looks for.
                    "labels": {"grafana_dashboard": "1"},
                },
                "data": {"cachescope.json": dashboard},
            }
        ),
    }


def _group(name: str, rules: list[dict[str, Any]], timing: Timing) -> dict[str, Any]:
    laid_out = [{**rule, "expr": promql_parser.parse(rule["expr"]).prettify()} for rule in rules]
    return {"name": name, "interval": timing.evaluation, "rules": laid_out}


class _Dumper(yaml.SafeDumper):
    """Writes long texts as blocks, and everything else on one line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _yaml(data: dict[str, Any]) -> str:
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return _MADE + text
