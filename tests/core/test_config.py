"""Configuration: one model, and mistakes that say what to do."""

from pathlib import Path

import pytest
import yaml

from vllm_cachescope.cache.quotas import read_quotas
from vllm_cachescope.cli.main import main
from vllm_cachescope.config import SECRET_VARIABLE, Config, ConfigError, OrgQuota, load
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Scope

DISK = {"type": "disk", "path": "/x", "capacity": "1GiB"}
REDIS = {"type": "redis", "url": "redis://cache"}
CONFIGS = Path(__file__).parents[2] / "configs"


def test_nothing_set_is_a_configuration() -> None:
    config = load({})
    assert config.allowed_ttls == (300, 1800, 3600, 43200, 86400)
    assert config.regions.of(Region.SYSTEM).scope is Scope.ORG


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cpu_byte": 1}, ["cpu_byte", "no such key", "cpu_bytes"]),
        ({"regions": {"tool": {}}}, ["regions.tool", "no such key", "messages, system, tools"]),
        ({"regions": {"tools": {"scop": "org"}}}, ["regions.tools.scop", "scope, ttl"]),
        ({"cpu_bytes": "lots"}, ["cpu_bytes", "lots"]),
        ({"cpu_bytes": 0}, ["cpu_bytes", "greater than 0"]),
        ({"chunk_tokens": "128"}, ["chunk_tokens", "'128'", "integer"]),
        ({"ttls": ["5x"]}, ["ttls.0", "'5x'", "5m"]),
        (
            {"regions": {"tools": {"scope": "team"}}},
            ["regions.tools.scope", "'team'", "global, org, session"],
        ),
        (
            {"regions": {"tools": {"scope": "session"}}},
            ["regions", "only narrow", "session, org, org"],
        ),
        ({"regions": {"messages": {"ttl": "7m"}}}, ["regions.messages.ttl", "7m", "5m, 30m, 1h"]),
        ({"ledger": {}}, ["ledger", "directory", "url"]),
        ({"ledger": {"directory": "/x", "url": "sqlite://"}}, ["ledger", "one of the two"]),
        ({"ledger": {"directory": "/x", "sessions_for": "1h"}}, ["ledger.sessions_for", "86400"]),
        (
            {"ledger": {"directory": "/x", "sessions_for": "100d"}},
            ["sessions_for", "hours_for", "days_for"],
        ),
        ({"ledger": {"directory": "/x", "max_request": 3}}, ["ledger.max_request", "max_requests"]),
        ({"secret": "short"}, ["secret", "16"]),
        ({"secret": "x" * 16, "secret_file": "f"}, ["secret or secret_file, not both"]),
        ({"tenants": {"abc": "acme"}}, ["tenants: 3 characters", "SHA-256"]),
        ({"org_header": ""}, ["org_header"]),
        ({"sweep_interval": "0s"}, ["sweep_interval", "'0s'"]),
        ({"tiers": [{"type": "rediss"}]}, ["tiers.0", "'rediss'", "disk, lmcache, redis"]),
        ({"tiers": [{"url": "redis://h"}]}, ["tiers.0", "type", "disk, lmcache, redis"]),
        ({"tiers": [{"type": "redis"}]}, ["tiers.0.url", "required"]),
        (
            {"tiers": [{"type": "redis", "url": "redis://h", "adapter": {}}]},
            ["tiers.0.adapter", "no such key", "url"],
        ),
        (
            {"tiers": [{"type": "lmcache", "url": "redis://h"}]},
            ["tiers.0.url", "no such key", "adapter"],
        ),
        (
            {"tiers": [{"type": "lmcache", "adapter": {"base_path": "/x"}}]},
            ["tiers.0.adapter", "needs a type", "fs, resp or s3"],
        ),
        (
            {"tiers": [{"type": "redis", "url": "redis://h", "connections": 0}]},
            ["tiers.0.connections", "greater than or equal to 1"],
        ),
        (
            {"tiers": [{"type": "redis", "url": "redis://h", "encrypt": "yes"}]},
            ["tiers.0.encrypt", "valid boolean"],
        ),
        ({"tiers": [{"type": "disk", "path": "/x"}]}, ["tiers.0.capacity", "required"]),
        (
            {"tiers": [DISK | {"path": "cache"}]},
            ["tiers.0.path", "cache depends on where", "from /"],
        ),
        ({"tiers": [DISK | {"capacity": 0}]}, ["tiers.0.capacity", "greater than 0"]),
        (
            {"tiers": [DISK], "quotas": {"disk": {"capacity": 1}}},
            ["quotas.disk.capacity", "knows its own"],
        ),
        (
            {"tiers": [DISK], "quotas": {"disk": {"reserve": "2GiB"}}},
            ["quotas.disk", "more is reserved"],
        ),
        (
            {"eviction": {"policy": "lifetime", "hierarchy": "exclusive"}},
            ["eviction", "hierarchy: exclusive needs policy: learned"],
        ),
        (
            {"eviction": {"policy": "lifetime", "prefetch_share": 0.1}},
            ["eviction", "prefetch_share needs policy: learned"],
        ),
        ({"quotas": {"gpu": {}}}, ["quotas.gpu", "no such tier", "device, cpu"]),
        ({"quotas": {"cpu": {"qouta": 1}}}, ["quotas.cpu.qouta", "capacity, orgs, quota, reserve"]),
        (
            {"quotas": {"cpu": {"orgs": {"acme": {"quotta": 1}}}}},
            ["quotas.cpu.orgs.acme.quotta", "quota, reserve"],
        ),
        ({"quotas": {"cpu": {"quota": "some"}}}, ["quotas.cpu.quota", "some"]),
        ({"quotas": {"cpu": {"quota": -1}}}, ["quotas.cpu.quota", "-1"]),
        ({"quotas": {"cpu": {"quota": 1, "reserve": 2}}}, ["quotas.cpu", "more than its quota"]),
        (
            {"quotas": {"cpu": {"quota": 9, "reserve": 2, "orgs": {"acme": {"quota": 1}}}}},
            ["quotas.cpu.orgs.acme", "more than its quota"],
        ),
        ({"quotas": {"cpu": {"reserve": "2GiB"}}}, ["quotas.cpu", "more is reserved"]),
        (
            {"quotas": {"cpu": {"orgs": {name: {"reserve": "600MiB"} for name in "ab"}}}},
            ["quotas.cpu.orgs.b", "more is reserved"],
        ),
        ({"quotas": {"device": {"capacity": 1}}}, ["quotas.device.capacity", "knows its own"]),
        (
            {"tiers": [REDIS], "quotas": {"redis": {"reserve": 1}}},
            ["quotas.redis", "needs quotas.redis.capacity"],
        ),
        ({"config_file": "does-not-exist.yaml"}, ["config_file", "does-not-exist.yaml"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(
    wrong: dict[str, object], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(wrong)
    for words in says:
        assert words in str(caught.value)


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"secret": "tooshort"})
    assert "tooshort" not in str(caught.value)
    assert "sesame" not in repr(load({"secret": "open sesame please"}))


@pytest.mark.parametrize(
    "tier",
    [
        {"type": "redis", "url": "redis://:sesame@h", "name": "9"},
        {"type": "rediss", "url": "redis://:sesame@h"},
        {"type": "lmcache", "adapter": {"password": "sesame"}},
        {"type": "lmcache", "adapter": {"type": "resp", "password": "sesame"}, "name": "9"},
    ],
)
def test_a_password_of_a_tier_is_never_shown(tier: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"tiers": [tier]})
    assert "sesame" not in str(caught.value)
    fine = {"type": "lmcache", "adapter": {"type": "resp", "password": "sesame"}}
    assert "sesame" not in repr(load({"tiers": [fine]}))


def test_keys_beside_the_file_override_it_at_every_depth(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("cpu_bytes: 2GiB\nregions: {tools: {scope: global, ttl: 1h}}\n")
    config = load({"config_file": str(path), "regions": {"tools": {"ttl": "5m"}}})
    assert config.cpu_bytes == 2 << 30
    assert (config.regions.tools.scope, config.regions.tools.ttl_s) == (Scope.GLOBAL, 300)


PRICES = CONFIGS / "prices.yaml"  # a file that a configuration names


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.glob("*.yaml")} - {PRICES}), ids=lambda path: path.name
)
def test_the_files_operators_copy_are_valid(path: Path) -> None:
    load(yaml.safe_load(path.read_text()))


def test_the_reference_file_shows_every_key_at_its_default() -> None:
    shown = yaml.safe_load((CONFIGS / "cachescope.yaml").read_text())
    assert set(shown) == set(Config.model_fields)
    assert load(shown) == Config()


def test_the_secret_comes_from_the_configuration_its_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "from the environment")
    assert load({}).secret_bytes() == b"from the environment"
    assert load({"secret": "from the configuration"}).secret_bytes() == b"from the configuration"
    path = tmp_path / "secret"
    path.write_text("from the secret file\n")
    assert load({"secret_file": str(path)}).secret_bytes() == b"from the secret file"
    path.write_text("short")
    with pytest.raises(ConfigError, match="secret_file"):
        load({"secret_file": str(path)}).secret_bytes()
    monkeypatch.delenv(SECRET_VARIABLE)
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        load({}).secret_bytes()


def test_tenants_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text('{"%s": "acme"}' % ("0" * 64))
    assert load({"tenants_file": str(path)}).tenant_names() == {"0" * 64: "acme"}
    path.write_text('{"0": "acme"}')
    with pytest.raises(ConfigError, match="SHA-256"):
        load({"tenants_file": str(path)}).tenant_names()


def test_shares_are_read_with_the_organisations_ids() -> None:
    config = load(
        {
            "tenants": {"0" * 64: "acme"},
            "tiers": [REDIS],
            "quotas": {
                "redis": {
                    "quota": "1GiB",
                    "reserve": "1MiB",
                    "capacity": "9GiB",
                    "orgs": {"acme": {"quota": "2GiB"}, "key:0": {"reserve": 0}, "global": {}},
                }
            },
        }
    )
    assert config.org_quotas("redis") == {
        "name:acme": OrgQuota(quota=2 << 30, reserve=1 << 20),
        "key:0": OrgQuota(quota=1 << 30, reserve=0),
        "global": OrgQuota(quota=1 << 30, reserve=1 << 20),
    }
    assert config.org_quotas("cpu") == {}
    with pytest.raises(ConfigError, match=r"quotas\.cpu\.orgs: 'zeta' is no organisation"):
        load({"quotas": {"cpu": {"orgs": {"zeta": {}}}}}).org_quotas("cpu")
    gateways = load({"org_header": "x-org", "quotas": {"cpu": {"orgs": {"zeta": {}}}}})
    assert list(gateways.org_quotas("cpu")) == ["header:zeta"]


def test_shares_are_counted_in_whole_entries() -> None:
    secret = {"secret": "a secret of the tests", "quotas": {"cpu": {"quota": 1050, "reserve": 350}}}
    shares = read_quotas(load(secret), "cpu", 100)
    assert shares is not None
    assert (shares.quota(b"any"), shares.reserve(b"any"), shares.over(b"any", 13)) == (10, 4, 3)
    assert read_quotas(load(secret), "device", 100) is None


def test_serve_prints_the_command_it_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--set", "cpu_bytes=2GiB", "--dry-run", "--port", "9"]) == 0
    printed = capsys.readouterr().out
    assert "CacheScopeConnector" in printed and '"cpu_bytes":"2GiB"' in printed
    assert printed.rstrip().endswith("--port 9")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "cpu_bites=1"], "cpu_bites"),
        (["--set", "cpu_bytes"], "KEY=VALUE"),
        (["--set", "quotas.cpu.orgs.zeta.quota=1GiB"], "'zeta' is no organisation"),
        (["--kv-transfer-config", "{}"], "--kv-transfer-config"),
        (["--set", "secret_file=nowhere"], "nowhere"),
    ],
)
def test_serve_refuses_a_mistake_before_it_starts_anything(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == ""
