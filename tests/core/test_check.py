"""``cachescope check`` and the check of every start: memory, files, what becomes of findings."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_cachescope.cli.main import main
from vllm_cachescope.config import CONNECTOR, ConfigError, load
from vllm_cachescope.connectors.vllm import (
    config_check,
    memory,
    preflight,
    private_files,
    shm_regions,
)
from vllm_cachescope.connectors.vllm.findings import Finding, Status
from vllm_cachescope.connectors.vllm.memory import Memory, Room

GIB = 2**30
MACHINE = Room("the machine", 64 * GIB, 40 * GIB)
CONTAINER = Room("the memory limit of this container", 24 * GIB, 10 * GIB)


def room(shared: int, *others: Room) -> Memory:
    """Return a machine whose shared memory has ``shared`` GiB free of 32."""
    return Memory(Room("/dev/shm", 32 * GIB, shared * GIB), (MACHINE, *others))


@pytest.mark.parametrize(
    ("gib", "engines", "there", "status", "says"),
    [
        (16, 1, room(16), Status.OK, "16.0 GiB fits: /dev/shm has 16.0 GiB free of 32.0 GiB"),
        (17, 1, room(16), Status.FAILURE, "allowed: 16.0 GiB or less, or a larger /dev/shm"),
        (17, 2, room(32), Status.FAILURE, "2 × 17.0 GiB does not fit: /dev/shm has"),
        (17, 2, room(32), Status.FAILURE, "allowed: 16.0 GiB or less, or a larger"),
        (65, 1, room(32), Status.FAILURE, "of 32.0 GiB; allowed: 32.0 GiB or less"),
        (25, 1, room(32, CONTAINER), Status.FAILURE, "the memory limit of this container has 10.0"),
        (24, 1, room(32, CONTAINER), Status.WARNING, "is more than is available now: the memory"),
        (10, 1, room(32, CONTAINER), Status.OK, "10.0 GiB fits"),
    ],
)
def test_the_cpu_tier_must_fit(
    gib: int, engines: int, there: Memory, status: Status, says: str
) -> None:
    found = memory.check(gib * GIB, engines, there)
    assert found.status is status and says in str(found), found


def test_more_than_the_machine_has_is_not_helped_by_more_shared_memory() -> None:
    assert "larger" not in memory.check(65 * GIB, 1, room(32)).remedy


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        (
            "0::/pods/own\n",
            {
                "pods/own/memory.max": "max\n",
                "pods/own/memory.current": "0",
                "pods/own/memory.stat": "inactive_file 0\n",
                "pods/memory.max": "8000\n",
                "pods/memory.current": "5000\n",
                "pods/memory.stat": "anon 7\ninactive_file 1000\n",
            },
        ),
        (
            "3:cpu:/x\n2:memory:/not/in/this/container\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "8000\n",
                "memory/memory.usage_in_bytes": "5000\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
            },
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, lines: str, files: dict[str, str]) -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable: 60 kB\nHugePages_Total: 0\n"
    write(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": lines})
    write(tmp_path / "sys/fs/cgroup", files)
    found = memory.measure(tmp_path, tmp_path / "proc", tmp_path / "sys")
    machine, container = found.others
    assert (machine.total, machine.free) == (102_400, 61_440)
    assert (container.total, container.free) == (8000, 4000)
    assert found.shared.total > found.shared.free > 0


def test_what_a_killed_engine_left_counts_as_free(tmp_path: Path) -> None:
    for name in ("alive", "dead"):
        with shm_regions.claim(f"cachescope-{name}", tmp_path):
            (tmp_path / f"vllm_offload_cachescope-{name}.mmap").write_bytes(bytes(1 << 20))
    with shm_regions.claim("cachescope-alive", tmp_path):
        assert shm_regions.stale_bytes(tmp_path) == 1 << 20
    assert shm_regions.stale_bytes(tmp_path) == 2 << 20
    assert len(shm_regions.remove_stale(tmp_path)) == 2 and shm_regions.stale_bytes(tmp_path) == 0


def test_files_with_secrets_are_private(tmp_path: Path) -> None:
    secret, config = tmp_path / "secret", tmp_path / "cachescope.yaml"
    secret.write_text("a secret of the tests")
    config.write_text(f"secret_file: {secret}\noperator_token: sesame of the tests\n")
    extra = {"config_file": str(config)}

    def found(secret_mode: int, config_mode: int) -> dict[str, Status]:
        secret.chmod(secret_mode)
        config.chmod(config_mode)
        return {it.subject: it.status for it in private_files.check(extra, load(extra))}

    assert found(0o600, 0o640) == {"secret_file": Status.OK, "config_file": Status.OK}
    assert found(0o644, 0o660) == {"secret_file": Status.WARNING, "config_file": Status.WARNING}
    # Without a secret in it, it may be read by anybody.
    config.write_text(f"secret_file: {secret}\n")
    assert found(0o600, 0o644) == {"secret_file": Status.OK}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts vLLM's `EngineArgs` with keys of the configuration, as far as we take part."""
    module: Any = ModuleType("vllm.engine.arg_utils")

    class EngineArgs:
        data_parallel_size = 1
        enable_prefix_caching: bool | None = None
        caches = True

        def __init__(self, extra: dict[str, Any]) -> None:
            self.kv_transfer_config = {
                "kv_connector": CONNECTOR,
                "kv_connector_extra_config": extra,
            }

        def create_engine_config(self) -> Any:
            cache = SimpleNamespace(enable_prefix_caching=self.caches)
            return SimpleNamespace(cache_config=cache)

    module.EngineArgs = EngineArgs
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    config_check.install(lambda: None)

    def create(extra: dict[str, Any], **attributes: Any) -> Any:
        arguments = EngineArgs(extra)
        vars(arguments).update(attributes)
        return arguments.create_engine_config()

    return create


def test_a_cpu_tier_that_does_not_fit_stops_the_start(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"^CacheScope configuration: cpu_bytes: 100\.0 TiB"
    ) as it:
        start({"cpu_bytes": "100TiB"})
    assert " free of " in str(it.value) and "; allowed: " in str(it.value)
    assert main(["serve", "m", "--set", "cpu_bytes=100TiB"]) == 2
    assert capsys.readouterr().err == f"{it.value}\n"
    with pytest.raises(ConfigError, match=r"cpu_bytes: 1000000 × 1\.0 GiB does not fit"):
        start({}, data_parallel_size=1_000_000)
    # Only those on this machine count.
    start({}, data_parallel_size=1_000_000, data_parallel_size_local=1)
    start({}, data_parallel_size=1_000_000, data_parallel_rank=7)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (None, "vLLM turns it off for this model by default, .*; allowed: --enable-prefix-caching"),
        (False, "it was turned off, .*; allowed: --enable-prefix-caching"),
        (True, "vLLM cannot cache prefixes of this model here, .* a vLLM without the connector"),
    ],
)
def test_an_engine_that_caches_no_prefix_stops_the_start(
    start: Any, asked: bool | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"enable_prefix_caching: {says}"):
        start({}, caches=False, enable_prefix_caching=asked)


def test_a_warning_is_one_line_in_the_log(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "secret"
    path.write_text("a secret of the tests")
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        start({"secret_file": str(path)})
    (record,) = caplog.records
    assert record.getMessage() == (
        f"secret_file: {path} holds a secret and is open to others (mode 644); "
        f"allowed: 600 or 640, as of chmod 600 {path}"
    )


FOUND = [
    Finding("model", Status.OK, "Qwen3ForCausalLM"),
    Finding(
        "tier redis", Status.FAILURE, "redis://h does not answer: [no]", "a store that answers"
    ),
]


@pytest.mark.parametrize(("count", "status"), [(1, 0), (2, 1)])
def test_a_failure_is_the_exit_status(
    count: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "check", lambda *launch: iter(FOUND[:count]))
    assert main(["check", "m"]) == status
    table = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in table and f"{count - 1} failures, 0 warnings." in table
    assert main(["check", "m", "--json"]) == status
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [it["status"] for it in findings] == ["ok", "failure"][:count]
    assert findings[0] | {"found": "Qwen3ForCausalLM", "remedy": ""} == findings[0]
