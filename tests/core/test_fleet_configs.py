"""What an operator of a fleet starts from: well-formed, complete, and true to what it stands on."""

import math
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from tests.core.test_monitoring import CONFIGS, OLDEST_KUBERNETES, mebibytes, run, tool
from vllm_cachescope.config import load

FLEET = CONFIGS / "fleet"
SECRETS = ("cachescope-secret", "operator-token", "redis-password")


@pytest.fixture(scope="module")
def composed() -> dict:
    # Compose knows YAML's merge keys, the checker does not.
    composed = yaml.safe_load((FLEET / "compose.yaml").read_text())
    PyCompose.from_yaml(yaml.safe_dump(composed))
    return composed


def loaded(text: str, tmp_path):
    """The configuration, with private files where it looks for them."""
    for line in text.splitlines():
        key, _, value = line.strip().partition(": ")
        if key.endswith("_file"):
            file = tmp_path / value.rpartition("/")[2]
            file.write_text("sixteen characters or more")
            file.chmod(0o600)
            text = text.replace(value, str(file))
    path = tmp_path / "cachescope.yaml"
    path.write_text(text)
    return load({"config_file": str(path)})


def test_the_compose_file_mounts_and_builds_what_is_there(composed) -> None:
    services = composed["services"]
    mounts = [volume for service in services.values() for volume in service.get("volumes", ())]
    sources = {mount.split(":")[0] for mount in mounts if mount.startswith(".")}
    assert sources == {"./cachescope.yaml", "./prometheus.yaml", "../prometheus"}
    assert all((FLEET / source).exists() for source in sources)
    built = {service["build"]["dockerfile"] for service in services.values() if "build" in service}
    assert all((FLEET / dockerfile).exists() for dockerfile in built) and len(built) == 2
    ignored = (FLEET / ".gitignore").read_text().splitlines()
    assert {secret["file"].removeprefix("./") for secret in composed["secrets"].values()} == set(
        SECRETS
    )
    assert set(SECRETS) <= set(ignored)


def test_two_replicas_are_alike_and_share_a_redis_that_only_they_reach(composed) -> None:
    services = composed["services"]
    zero, one = services["replica-0"], services["replica-1"]
    devices = [
        service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for service in (zero, one)
    ]
    assert devices == [["0"], ["1"]]
    assert {k: v for k, v in zero.items() if k != "deploy"} == {
        k: v for k, v in one.items() if k != "deploy"
    }
    on_cache = {name for name, it in services.items() if "cache" in it.get("networks", ())}
    assert on_cache == {"redis", "replica-0", "replica-1"}
    assert composed["networks"]["cache"] == {"internal": True}
    assert "ports" not in services["redis"] and "ports" not in zero


def test_a_replica_has_room_for_its_cpu_tier_and_finds_its_secrets(composed, tmp_path) -> None:
    replica = composed["services"]["replica-0"]
    text = (FLEET / "cachescope.yaml").read_text()
    for line in text.splitlines():
        key, _, value = line.strip().partition(": ")
        if key.endswith("_file"):
            assert value.removeprefix("/run/secrets/") in replica["secrets"]
    config = loaded(text, tmp_path)
    room = int(replica["shm_size"].removesuffix("m"))
    assert room == math.ceil(config.cpu_bytes * 1.2 / 2**20)
    (tier,) = config.tiers
    assert tier.url.get_secret_value().startswith("redis://redis:6379")


def test_smg_and_prometheus_know_both_replicas(composed) -> None:
    replicas = [name for name in composed["services"] if name.startswith("replica-")]
    smg = composed["services"]["smg"]["command"]
    assert [f"http://{name}:8000" for name in replicas] == [a for a in smg if "http://" in a]
    scraped = yaml.safe_load((FLEET / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    assert targets["vllm"] == [f"{name}:8000" for name in replicas]
    assert targets["smg"] == [f"smg:{smg[smg.index('--prometheus-port') + 1]}"]


def test_prometheus_takes_its_configuration_and_the_rules(tmp_path) -> None:
    shutil.copy(FLEET / "prometheus.yaml", tmp_path)
    shutil.copytree(CONFIGS / "prometheus", tmp_path / "rules")
    run(tool("promtool"), "check", "config", str(tmp_path / "prometheus.yaml"))


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> list[dict]:
    """What `kubectl apply -k` would apply."""
    kubectl = tool("kubectl")
    configs = tmp_path_factory.mktemp("fleet") / "configs"
    shutil.copytree(CONFIGS, configs)
    for name in ("secret", "operator-token"):
        (configs / "kubernetes" / name).write_text("sixteen characters or more")
    overlay = configs / "fleet" / "kubernetes"
    without = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True)
    assert without.returncode != 0 and b"redis-password" in without.stderr
    (overlay / "redis-password").write_text("a password")
    return list(yaml.safe_load_all(run(kubectl, "kustomize", str(overlay))))


def named(applied: list[dict], kind: str, name: str) -> dict:
    (found,) = [
        one for one in applied if one["kind"] == kind and one["metadata"]["name"].startswith(name)
    ]
    return found


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_kubernetes_knows_what_is_applied(applied, version: str) -> None:
    kinds = set()
    for document in applied:
        if document["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        kubernetes_validate.validate(document, version, strict=True)
        kinds.add(document["kind"])
    assert kinds >= {"Deployment", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount"}


def test_the_replicas_have_the_plugin_with_its_redis(applied, tmp_path) -> None:
    replicas = named(applied, "Deployment", "fleet-")
    assert replicas["spec"]["replicas"] == 2
    pod = replicas["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "--kv-transfer-config" in container["args"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    names = {v["name"]: v for v in pod["volumes"]}
    made = names["cachescope-config"]["configMap"]["name"]
    config = named(applied, "ConfigMap", made)["data"]["cachescope.yaml"]
    for line in config.splitlines():
        key, _, value = line.strip().partition(": ")
        if key.endswith("_file"):
            assert value.rpartition("/")[0] in mounts
    read = loaded(config, tmp_path)
    (tier,) = read.tiers
    redis = named(applied, "Service", "redis")
    assert tier.url.get_secret_value().split("/")[2] == f"redis:{redis['spec']['ports'][0]['port']}"
    (shm,) = [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v]
    assert mebibytes(shm["sizeLimit"]) == math.ceil(read.cpu_bytes * 1.2 / 2**20)


def test_smg_finds_the_pods_and_may_look_at_nothing_else(applied) -> None:
    labels = named(applied, "Deployment", "fleet-")["spec"]["template"]["metadata"]["labels"]
    args = named(applied, "Deployment", "smg")["spec"]["template"]["spec"]["containers"][0]["args"]
    key, _, value = args[args.index("--selector") + 1].partition("=")
    assert labels[key] == value
    (rule,) = named(applied, "Role", "smg")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    (peer,) = named(applied, "NetworkPolicy", "redis")["spec"]["ingress"]
    assert peer["from"] == [{"podSelector": {"matchLabels": labels}}]
