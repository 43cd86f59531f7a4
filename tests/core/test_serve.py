"""``cachescope serve`` refuses what the engine would refuse, in the same words."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.serve import read_settings
from vllm_cachescope.config import CONNECTOR, SECRET_VARIABLE, Config, ConfigError, make_up_secret
from vllm_cachescope.connectors.vllm import config_check

SECRET = "a secret of the tests"
REDIS = {"type": "redis", "url": "redis://cache"}


def with_url(url: str) -> dict[str, Any]:
    return {"secret": SECRET, "tiers": [REDIS | {"url": url}]}


def refused_by_engine(extra_config: dict[str, Any]) -> str:
    """Return what an engine says of a configuration it cannot use."""
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=extra_config)
    with pytest.raises(ConfigError) as caught:
        config_check.read(transfer)
    return str(caught.value)


@pytest.fixture
def no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What the configurations below refer to."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").write_text("short")
    (tmp_path / "tenants.yaml").write_text("abc: acme\n")
    (tmp_path / "list.yaml").write_text("- acme\n")
    return tmp_path


@pytest.mark.usefixtures("no_secret")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cpu_bites": 1}, ["cpu_bites: there is no such key (value 1)", "cpu_bytes"]),
        ({"cpu_bytes": "lots"}, ["cpu_bytes: ", "'lots'"]),
        ({"regions": {"tools": {"ttl": "7m"}}}, ["regions.tools.ttl", "7m", "5m, 30m, 1h"]),
        ({"tenants": {"abc": "acme"}}, ["tenants.abc: ", "SHA-256"]),
        ({"tenants_file": "DIR/nowhere"}, ["tenants_file: ", "nowhere cannot be read"]),
        ({"tenants_file": "DIR/tenants.yaml"}, ["tenants_file.abc: ", "SHA-256"]),
        ({"tenants_file": "DIR/list.yaml"}, ["tenants_file: ", "['acme']"]),
        ({"secret_file": "DIR/nowhere"}, ["secret_file: ", "nowhere cannot be read"]),
        ({"secret_file": "DIR/file"}, ["secret_file: ", "5 characters", "16 or more"]),
        ({"tiers": [REDIS]}, ["secret: there is none", "must have the same; set secret"]),
        (
            {"quotas": {"cpu": {"orgs": {"zeta": {}}}}},
            ["quotas.cpu.orgs: 'zeta' is no organisation", "a name in tenants"],
        ),
        ({"quotas": {"gpu": {}}}, ["quotas.gpu: there is no such tier; allowed: device, cpu"]),
        ({"diffs": {"directory": "DIR/open"}}, ["diffs.directory: ", "755", "allowed: 700"]),
        ({"diffs": {"directory": "DIR/file"}}, ["diffs.directory: ", "cannot be made"]),
        ({"diffs": {"directory": "DIR/file/in"}}, ["diffs.directory: ", "cannot be made"]),
        (with_url("http://:sesame@cache"), ["tier redis: url: ", "allowed: redis, rediss, unix"]),
        (with_url("cache:6379"), ["tier redis: url: ", "allowed: redis, rediss, unix"]),
        (with_url("redis+rings://h"), ["tier redis: url: ", "redis+sentinel, rediss+sentinel"]),
        (with_url("redis://cache?db=first"), ["tier redis: url: ", "db"]),
        (with_url("redis+sentinel://h:26379"), ["tier redis: url: ", "names the service"]),
        (with_url("redis+cluster://h/1"), ["tier redis: url: ", "only database 0"]),
    ],
    ids=str,
)
def test_serve_and_the_engine_refuse_the_same(
    wrong: dict[str, Any],
    says: list[str],
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = directory / "cachescope.yaml"
    path.write_text(yaml.safe_dump(wrong).replace("DIR", str(directory)))
    assert main(["serve", "m", "--cachescope", str(path)]) == 2
    printed = capsys.readouterr()
    make_up_secret()  # As the plugin does in each of vLLM's processes.
    assert printed.err == refused_by_engine({"config_file": str(path)}) + "\n"
    assert printed.out == ""
    assert all(words in printed.err for words in says), printed.err
    assert printed.err.count("\n") == 1 and "sesame" not in printed.err


@pytest.mark.usefixtures("no_secret")
def test_what_the_engine_takes_serve_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra_config: dict[str, Any] = {
        "secret": SECRET,
        "tiers": [REDIS],
        "diffs": {"directory": str(tmp_path / "new" / "diffs")},
        "quotas": {"cpu": {"orgs": {"global": {"quota": "1GiB"}}}},
    }
    path = tmp_path / "cachescope.yaml"
    path.write_text(yaml.safe_dump(extra_config))
    assert main(["serve", "m", "--cachescope", str(path), "--dry-run"]) == 0
    assert str(path) in capsys.readouterr().out
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=extra_config)
    assert isinstance(config_check.read(transfer), Config)
    assert not (tmp_path / "new").exists()


def test_a_secret_in_the_environment_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    assert "CACHESCOPE_SECRET holds 5 characters" in refused_by_engine({"tiers": [REDIS]})


def test_a_made_up_secret_replaces_none_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    make_up_secret()
    assert Config().secret_bytes() == SECRET.encode()
    for nothing in ("", None):
        monkeypatch.delenv(SECRET_VARIABLE)
        if nothing is not None:
            monkeypatch.setenv(SECRET_VARIABLE, nothing)
        make_up_secret()
        made_up = Config().secret_bytes()
        assert len(made_up) > 64
        make_up_secret()
        assert Config().secret_bytes() == made_up


def test_assignments_are_keys_of_the_configuration() -> None:
    assigned = ["cpu_bytes=2GiB", "regions.tools.ttl=1h", "regions.tools.scope=org", "ttls=[5m]"]
    assert read_settings(None, assigned) == {
        "cpu_bytes": "2GiB",
        "regions": {"tools": {"ttl": "1h", "scope": "org"}},
        "ttls": ["5m"],
    }


@pytest.mark.parametrize(
    ("assigned", "says"),
    [
        (["quotas"], "--set quotas: write KEY=VALUE"),
        (["=5"], "--set =5: write KEY=VALUE"),
        (["quotas..cpu=5"], "--set quotas..cpu=5: write KEY=VALUE"),
        (["regions=5", "regions.tools=1"], "--set regions.tools=1: regions has a value already"),
        (["ttls=[5m"], "--set ttls=[5m: its value is not valid"),
        (["secret=2026-11-25"], "--set secret=2026-11-25: its value is not valid"),
    ],
)
def test_a_malformed_assignment_is_one_message(
    assigned: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", *(f"--set={one}" for one in assigned)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"CacheScope configuration: {says}") and printed.count("\n") == 1


def test_a_file_that_is_no_yaml_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("ttls: [5m")
    assert main(["serve", "m", "--cachescope", str(path)]) == 2
    printed = capsys.readouterr().err
    assert "broken.yaml is not valid" in printed and printed.count("\n") == 1


def test_a_password_in_the_wrong_place_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("tiers={url: 'redis://:sesame@h'}", "tiers=[{type: redis, password: sesame}]"):
        assert main(["serve", "m", "--set", wrong]) == 2
        assert "sesame" not in capsys.readouterr().err
