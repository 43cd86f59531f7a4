"""What an operator loads into Grafana, Prometheus and Kubernetes, looked at without any of them
running: it is what its sources say, well-formed, complete, and has the names that /metrics has."""

import json
import math
import re
import shutil
import subprocess

import kubernetes_validate
import promql_parser
import pytest
import yaml
from compose_spec import PyCompose
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.alerts import alerts
from monitoring.board import board
from monitoring.documents import DOCS, ROOT, documents
from monitoring.limits import SHIPPED
from monitoring.queries import VARIABLES
from monitoring.suggestions import SUGGESTIONS
from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.config import load
from vllm_cachescope.diagnosis.outcome import DiagnosisKind
from vllm_cachescope.metrics import METRICS

CONFIGS = ROOT / "configs"
HANDBOOK = (ROOT / "docs" / "observability.md").read_text()
BOARD = json.loads((CONFIGS / "grafana" / "cachescope.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = ["prometheus/rules.yaml", "prometheus/alerts.yaml"]

OLDEST_KUBERNETES = "1.29"


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def filled(expression: str) -> str:
    """An expression with some value for each of the dashboard's variables."""
    for name in ("__rate_interval", "__range"):
        expression = expression.replace(f"${name}", "5m")
    return re.sub(r"\$[A-Za-z]\w*", ".*", expression)


def expressions() -> dict[str, list[str]]:
    return {panel["title"]: [t["expr"] for t in panel["targets"]] for panel in PANELS}


@pytest.mark.parametrize("name", documents())
def test_what_is_made_is_as_its_sources_make_it(name: str) -> None:
    assert (ROOT / name).read_text() == documents()[name], "run python -m monitoring"


def test_the_dashboard_is_read_by_grafanas_own_types() -> None:
    register_default_plugins()
    again = json.dumps(Dashboard.from_json(BOARD), cls=JSONEncoder, sort_keys=True)
    assert json.loads(again) == BOARD


def test_the_dashboard_is_a_neighbour_of_vllms_own() -> None:
    names = [variable["name"] for variable in BOARD["templating"]["list"]]
    assert names == ["datasource", "job", "model_name", "instance", "engine"]
    assert "vllm" in BOARD["tags"]
    links = {link["title"]: link for link in BOARD["links"]}
    neighbours = links["vLLM dashboards"]
    assert (neighbours["tags"], neighbours["includeVars"], neighbours["keepTime"]) == (
        ["vllm"],
        True,
        True,
    )
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def test_no_panel_lies_on_another() -> None:
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_query_is_one_of_promql_and_keeps_to_what_the_reader_chose() -> None:
    for title, found in expressions().items():
        for expression in found:
            promql_parser.parse(filled(expression))
            for selector in re.findall(r"cachescope_[\w:]+(\{[^}]*\})?", expression):
                assert 'model_name=~"$model_name"' in selector, (title, expression)


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = set(re.findall(r"(?<![:\w])cachescope_\w+", json.dumps(expressions())))
    series = {
        name
        for metric in METRICS
        for name in (
            [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
            if metric.kind == "histogram"
            else [metric.shown]
        )
    }
    assert shown <= series
    missing = [m.name for m in METRICS if not any(name.startswith(m.name) for name in shown)]
    assert not missing


def test_every_label_in_a_rule_or_panel_is_one_of_its_metrics() -> None:
    labels = {metric.shown: {*metric.labels, "org"} for metric in METRICS}
    common = {*VARIABLES, "le"}
    rules = [rule["expr"] for path in RULES for rule in rules_of(path)]
    for expression in [*rules, *(one for found in expressions().values() for one in found)]:
        for name, matchers in re.findall(r"(?<![:\w])(cachescope_\w+)\{([^}]*)\}", expression):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            used = set(re.findall(r"(\w+)(?:=~|=|!=|!~)\"", matchers))
            assert used <= labels.get(name, labels.get(base, set())) | common, expression


def rules_of(path: str) -> list[dict]:
    (group,) = yaml.safe_load((CONFIGS / path).read_text())["groups"]
    return group["rules"]


def test_each_cause_of_a_break_has_a_suggestion() -> None:
    breaks = {kind for kind in DiagnosisKind if kind.is_break}
    assert set(SUGGESTIONS) == breaks | set(MissCause)


@pytest.mark.parametrize("alert", alerts(SHIPPED), ids=lambda alert: alert.name)
def test_each_alert_links_to_its_runbook(alert) -> None:
    url = alert.rule(DOCS)["annotations"]["runbook_url"]
    path, _, anchor = url.partition("#")
    assert path == "docs/observability.md"
    # As GitHub makes anchors of headings.
    headings = re.findall(r"^#+ (.*)$", HANDBOOK, re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_who_is_called_for_want_of_room_is_told_what_to_enlarge() -> None:
    (alert,) = [alert for alert in alerts(SHIPPED) if alert.name == "CacheScopeNoRoom"]
    assert "Enlarge cpu_bytes" in alert.rule(DOCS)["annotations"]["description"]


def test_the_links_lead_where_the_operator_says() -> None:
    made = documents("https://wiki.internal/cachescope")
    assert "https://wiki.internal/cachescope/observability.md" in board(
        "https://wiki.internal/cachescope"
    )
    for name in ("configs/prometheus/alerts.yaml", "configs/kubernetes/prometheusrule.yaml"):
        assert made[name].count("runbook_url: https://wiki.internal/cachescope/obs") == len(
            alerts(SHIPPED)
        )


def test_prometheus_takes_its_configuration_and_rules() -> None:
    checked = run(tool("promtool"), "check", "config", str(CONFIGS / "prometheus/prometheus.yaml"))
    assert "2 rule files found" in checked
    run(tool("promtool"), "check", "rules", *(str(CONFIGS / path) for path in RULES))


@pytest.mark.parametrize("name", ["alerts.yaml", "baseline.yaml"])
def test_each_alert_fires_for_what_it_is_for_and_ends_with_it(name: str) -> None:
    path = ROOT / "tests" / "monitoring" / name
    run(tool("promtool"), "test", "rules", str(path))


def test_every_alert_is_among_those_that_promtool_tests() -> None:
    tests = "".join(
        (ROOT / "tests" / "monitoring" / name).read_text()
        for name in ("alerts.yaml", "baseline.yaml")
    )
    assert all(f'alertname="{alert.name}"' in tests for alert in alerts(SHIPPED))


def test_alertmanager_takes_its_configuration() -> None:
    run(tool("amtool"), "check-config", str(CONFIGS / "prometheus" / "alertmanager.yaml"))


def test_the_compose_file_is_one_and_mounts_what_is_there() -> None:
    path = CONFIGS / "compose" / "compose.yaml"
    PyCompose.from_yaml(path.read_text())
    services = yaml.safe_load(path.read_text())["services"]
    mounts = [volume for service in services.values() for volume in service["volumes"]]
    sources = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(sources) == 4
    assert all((path.parent / source).exists() for source in sources)


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> list[dict]:
    """What `kubectl apply -k` would apply beside a Deployment and a Service such as the chart's."""
    kubectl = tool("kubectl")
    directory = tmp_path_factory.mktemp("overlay")
    component = directory / "cachescope"
    shutil.copytree(CONFIGS / "kubernetes", component)
    for name in ("secret", "operator-token"):
        (component / name).write_text("sixteen characters or more")
    shutil.copy(ROOT / "tests" / "monitoring" / "chart.yaml", directory / "vllm.yaml")
    own = {"resources": ["vllm.yaml"], "components": ["cachescope"]}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return list(yaml.safe_load_all(run(kubectl, "kustomize", str(directory))))


def the(applied: list[dict], kind: str) -> dict:
    (found,) = [one for one in applied if one["kind"] == kind]
    return found


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_kubernetes_knows_what_is_applied(applied, version: str) -> None:
    kinds = set()
    for document in applied:
        if document["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        kubernetes_validate.validate(document, version, strict=True)
        kinds.add(document["kind"])
    assert kinds == {"ConfigMap", "Deployment", "Secret", "Service"}


def test_the_pod_has_room_for_its_cpu_tier(applied, tmp_path) -> None:
    pod = the(applied, "Deployment")["spec"]["template"]["spec"]
    (config,) = [
        one["data"]["cachescope.yaml"]
        for one in applied
        if one["kind"] == "ConfigMap" and "cachescope.yaml" in one["data"]
    ]
    text = config.replace("/etc/cachescope/secrets", str(tmp_path))
    for name in ("secret", "operator-token"):
        (tmp_path / name).write_text("sixteen characters or more")
        (tmp_path / name).chmod(0o600)
    path = tmp_path / "cachescope.yaml"
    path.write_text(text)
    cpu_bytes = load({"config_file": str(path)}).cpu_bytes
    (shm,) = [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v]
    assert shm["medium"] == "Memory"
    assert mebibytes(shm["sizeLimit"]) == math.ceil(cpu_bytes * 1.2 / 2**20)
    container = pod["containers"][0]
    for bound in ("requests", "limits"):
        # The chart's own amount stays for vLLM.
        assert mebibytes(container["resources"][bound]["memory"]) >= mebibytes(
            shm["sizeLimit"]
        ) + mebibytes("16Gi")


def mebibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


def test_the_pod_reads_the_configuration_and_the_secrets(applied) -> None:
    pod = the(applied, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # The chart's own command, volume and mount are still there.
    assert container["command"][:2] == ["vllm", "serve"]
    assert container["volumeMounts"][-1]["mountPath"] == "/data"
    option, value = container["args"]
    assert option == "--kv-transfer-config"
    transfer = json.loads(value)
    assert transfer["kv_connector"] == "CacheScopeConnector"
    file = transfer["kv_connector_extra_config"]["config_file"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    names = {one["metadata"]["name"]: one for one in applied}
    configured = names[volumes[mounts[file]]["configMap"]["name"]]["data"]["cachescope.yaml"]
    secrets = volumes[mounts["/etc/cachescope/secrets"]]["secret"]
    assert secrets["defaultMode"] == 0o400
    for key in ("secret_file", "operator_token_file"):
        directory, _, name = yaml.safe_load(configured)[key].rpartition("/")
        assert directory in mounts
        assert name in names[secrets["secretName"]]["data"]


def test_prometheus_finds_the_pods_and_the_rules(applied) -> None:
    monitor = the(applied, "ServiceMonitor")["spec"]
    service = the(applied, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    groups = the(applied, "PrometheusRule")["spec"]["groups"]
    shipped = [yaml.safe_load((CONFIGS / path).read_text())["groups"] for path in RULES]
    assert groups == [group for groups in shipped for group in groups]
    (carried,) = [
        one["data"]["cachescope.json"]
        for one in applied
        if one["metadata"].get("labels", {}).get("grafana_dashboard")
    ]
    assert json.loads(carried) == BOARD


def test_without_its_secrets_nothing_is_applied(tmp_path) -> None:
    shutil.copytree(CONFIGS / "kubernetes", tmp_path / "cachescope")
    (tmp_path / "kustomization.yaml").write_text("components: [cachescope]\n")
    done = subprocess.run([tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True)
    assert done.returncode != 0
    assert b"secret" in done.stderr
