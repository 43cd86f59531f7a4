"""``cachescope serve`` refuses what the engine would refuse, in the same words."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vllm_cachescope.cli.launch import read_settings
from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.serve import without_secrets
from vllm_cachescope.config import (
    CONNECTOR,
    SECRET_VARIABLE,
    Config,
    ConfigError,
    RedisTier,
    load,
    make_up_secret,
)
from vllm_cachescope.config.exposure import refuse_secrets
from vllm_cachescope.config.secret import OPERATOR_VARIABLE
from vllm_cachescope.connectors.redis import address
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
        ({"tenants": {"sk-sesame": "acme"}}, ["tenants: 9 characters are not the SHA-256"]),
        ({"tenants_file": "DIR/nowhere"}, ["tenants_file: ", "nowhere cannot be read"]),
        ({"tenants_file": "DIR/tenants.yaml"}, ["tenants_file: 3 characters", "SHA-256"]),
        ({"tenants_file": "DIR/list.yaml"}, ["tenants_file: Input should be a valid dictionary"]),
        ({"secret_file": "DIR/nowhere"}, ["secret_file: ", "nowhere cannot be read"]),
        ({"secret_file": "DIR/file"}, ["secret_file: ", "5 characters", "16 or more"]),
        ({"operator_token_file": "DIR/file"}, ["operator_token_file: ", "16 or more"]),
        ({"secrett": "sesame of the tests"}, ["secrett: there is no such key (value not shown)"]),
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
        (
            {"secret": SECRET, "tiers": [REDIS | {"password_file": "DIR/nowhere"}]},
            ["tier redis: password_file: ", "nowhere cannot be read"],
        ),
        (
            {
                "secret": SECRET,
                "tiers": [
                    {"type": "redis", "url": "redis://:sesame@h", "password_file": "DIR/file"}
                ],
            },
            ["tier redis: url: ", "two passwords"],
        ),
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
    transfer = SimpleNamespace(
        kv_connector=CONNECTOR, kv_connector_extra_config={"config_file": str(path)}
    )
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
        (["=5"], "--set : write KEY=VALUE"),
        (["quotas..cpu=5"], "--set quotas..cpu: write KEY=VALUE"),
        (["regions=5", "regions.tools=1"], "--set regions.tools: regions has a value already"),
        (["regions.tools=1", "regions=5"], "--set regions: there are values for keys of regions"),
        (["ttls=[5m"], "--set ttls: its value is not valid"),
        (["secret=2026-11-25"], "--set secret: its value is not valid"),
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
    path.write_text("secret: [sesame of the tests\nttls: 5m\n")
    assert main(["serve", "m", "--cachescope", str(path)]) == 2
    printed = capsys.readouterr().err
    assert "broken.yaml is not valid: " in printed and "(line 2, column " in printed
    assert printed.count("\n") == 1 and "sesame" not in printed


@pytest.mark.parametrize(
    ("assigned", "says"),
    [
        (
            "secret=sesame of the tests",
            "secret: {}; allowed: secret_file, the variable CACHESCOPE_",
        ),
        ("secret=5e5a3e", "secret: {}; allowed: secret_file"),
        (
            "operator_token=sesame of the tests",
            "operator_token: {}; allowed: operator_token_file, the variable CACHESCOPE_OPERATOR_TO",
        ),
        ("secrett=sesame of the tests", "secrett: {}; allowed: a file of mode 600"),
        (
            "tiers=[{type: redis, url: 'redis://:sesame@h'}]",
            "tiers.0.url: {}; allowed: the tier's p",
        ),
        ("tiers=[{type: redis, url: 'redis://u:sesame@h/1'}]", "tiers.0.url: {}; allowed: the tie"),
        ("tiers=[{type: redis, url: 'h:6379?password=sesame'}]", "tiers.0.url: {}; allowed: the t"),
        ("tiers={url: 'redis://:sesame@h'}", "tiers.url: {}; allowed: the tier's password_file"),
        ("tiers=[{type: redis, password: sesame}]", "tiers.0.password: {}; allowed: a file"),
        (
            "tiers=[{type: lmcache, adapter: {type: s3, aws_secret_access_key: sesame}}]",
            "tiers.0.adapter.aws_secret_access_key: {}; allowed: a file of mode 600",
        ),
    ],
)
def test_a_secret_in_plain_sight_is_refused(
    assigned: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", "--set", assigned]) == 2
    printed = capsys.readouterr()
    why = "a secret may not stand where command lines and logs show it (value not shown)"
    assert printed.err.startswith(f"CacheScope configuration: {says.format(why)}"), printed.err
    assert printed.err.count("\n") == 1
    assert "sesame" not in printed.err + printed.out and printed.out == ""
    # The engine refuses the same; it might have come there in other ways.
    assert refused_by_engine(read_settings(None, [assigned])) + "\n" == printed.err


@pytest.mark.parametrize(
    "assigned",
    [
        "secret_file=/etc/cachescope/secret",
        "secret=null",
        "chunk_tokens=1024",
        "tiers=[{type: redis, url: 'redis://user@h:6379/1', password_file: /etc/p}]",
        "tiers=[{type: redis, url: 'redis+sentinel://h:26379,i:26379/service'}]",
        "tiers=[{type: lmcache, adapter: {type: fs, base_path: /x}}]",
        "quotas={cpu: {orgs: {secret-service: {quota: 1GiB}}}}",
        "diffs={directory: /x, redact: ['mail:.*@', '[?&]password=']}",
    ],
)
def test_what_is_no_secret_may_stand_anywhere(assigned: str) -> None:
    refuse_secrets(read_settings(None, [assigned]))


def test_a_redis_password_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"type": "redis", "name": "shared", "url": "redis://kv@cache/1"}

    def password(**more: str) -> Any:
        (tier,) = load({"tiers": [settings | more]}).tiers
        assert isinstance(tier, RedisTier)
        return address.parse(tier.url.get_secret_value(), tier.password()).options.get("password")

    assert password() is None
    monkeypatch.setenv("CACHESCOPE_SHARED_PASSWORD", "sesame of the environment")
    assert password() == "sesame of the environment"
    (tmp_path / "password").write_text("sesame of the file\n")
    assert password(password_file=str(tmp_path / "password")) == "sesame of the file"


def test_the_operators_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(OPERATOR_VARIABLE, raising=False)
    assert load({}).operators_token() is None
    monkeypatch.setenv(OPERATOR_VARIABLE, "sesame of the environment")
    assert load({}).operators_token() == b"sesame of the environment"
    (tmp_path / "token").write_text("sesame of the file\n")
    named = load({"operator_token_file": str(tmp_path / "token")})
    assert named.operators_token() == b"sesame of the file"
    monkeypatch.setenv(OPERATOR_VARIABLE, "short")
    assert f"{OPERATOR_VARIABLE} holds 5 characters" in refused_by_engine({})


def test_the_command_is_shown_without_vllms_own_secrets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = ["--api-key", "sesame", "open", "--port", "9", "--hf-token=sesame", "--seed=1"]
    assert main(["serve", "m", "--dry-run", *theirs]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("--api-key '***' '***' --port 9 '--hf-token=***' --seed=1")
    assert without_secrets(["serve", "m"]) == ["serve", "m"]


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["m"], "m"),
        (["m", "--port", "9"], "m"),
        (["--model", "m", "--port", "9"], "m"),
        (["--model=m"], "m"),
        (["m", "--model", "m"], "m"),
        (["--set", "cpu_bytes=1GiB", "m", "--port", "9"], "m"),
    ],
)
def test_the_model_is_named_first_or_by_its_option(
    arguments: list[str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--dry-run", *arguments]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command.count(model) == 1
    assert command[command.index("--kv-transfer-config") - 1] == model


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the model, first of all or with --model"),
        (["--port", "9", "m"], "name the model, first of all"),
        (["m", "--model", "n"], "the model is m and --model n; allowed: one of the two"),
        (["m", "--kv_transfer_config={}"], "CacheScope sets --kv_transfer_config itself"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_arguments_that_describe_no_launch(
    command: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cachescope {command}: {says}") and printed.out == ""
    assert printed.err.count("\n") == 1


def test_serving_without_vllm_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "m"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("cachescope serve: vLLM is not installed for ")
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--token", "sesame"], "--token: a token may not stand on a command line"),
        (["--token-file", "nowhere"], "--token-file: nowhere cannot be read"),
    ],
)
def test_a_token_of_a_purge_is_in_a_file_or_the_environment(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["purge", "--all", *arguments])
    printed = capsys.readouterr().err
    assert says in printed and "sesame" not in printed
