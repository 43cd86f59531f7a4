"""A mistake in the configuration stops the start with one message, and vLLM's traceback stays out
of it."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.datastructures import State

from tests.config_files import in_file
from tests.engine.clock import Clock
from tests.engine.engine import BLOCK_BYTES, SECRET
from tests.engine.server import ENVIRONMENT, MODEL, OPERATOR_TOKEN, SMALL, Api, serve, server
from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm import config_check, shm_regions
from vllm_cachescope.connectors.vllm.api_server import attachment

NAME = "vllm_cachescope.connectors.vllm.server.Middleware"


def transfer(**extra: object) -> list[str]:
    """Return the argument that enables the plugin, with keys of its configuration."""
    own = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(own)]


def start(model: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run vLLM's own command with ``arguments`` that stop it."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--dtype", "float32", "--enforce-eager", "--num-gpu-blocks-override", "40"),
            *("--max-model-len", "512", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | ENVIRONMENT,
    )


@pytest.mark.engine
def test_vllms_own_command_stops_with_one_message(tiny_model: Path) -> None:
    before = set(Path("/dev/shm").glob("vllm_offload_*.mmap*"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = pool.submit(start, tiny_model, *transfer(secret="sesame of the tests"))
        too_large = pool.submit(start, tiny_model, *transfer(cpu_bytes="100TiB"))
        # How much a chunk takes is known to the engine only.
        too_small = pool.submit(start, tiny_model, *transfer(cpu_bytes=4096))
        alone = pool.submit(start, tiny_model, "--middleware", NAME)
    for ended, expected in (
        (
            shown.result(),
            "secret: a secret may not stand where command lines and logs show it (value not shown)",
        ),
        (too_large.result(), "cpu_bytes: 100.0 TiB does not fit: /dev/shm has "),
        (
            too_small.result(),
            "cpu_bytes: 4096 holds not even one chunk; "
            f"allowed: {BLOCK_BYTES} or more with this model and block size",
        ),
        (alone.result(), "--middleware names CacheScope, and --kv-transfer-config does not"),
    ):
        said = ended.stderr + ended.stdout
        assert ended.returncode == 1
        found = re.findall("^CacheScope configuration: (.*)$", said, re.MULTILINE)
        assert len(found) == 1 and found[0].startswith(expected), found
        assert "Traceback" not in said and "sesame" not in said
    shm_regions.remove_stale()
    assert set(Path("/dev/shm").glob("vllm_offload_*.mmap*")) <= before


@pytest.mark.engine
def test_it_works_inside_vllms_multi_connector(tiny_model: Path, tmp_path: Path) -> None:
    config = {"secret": SECRET, "cpu_bytes": "64MiB", "operator_token": OPERATOR_TOKEN}
    argument, own = transfer(**in_file(config))
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [json.loads(own)]},
    }
    body = {"model": MODEL, "prompt": list(range(300, 700)), "max_tokens": 1}
    with serve(tiny_model, [argument, json.dumps(several), *SMALL], {}) as url:
        api = Api(url, Clock(tmp_path / "clock"))
        created, read = (api.post("/v1/completions", body).json()["usage"] for _ in range(2))
        details = [usage["prompt_tokens_details"] for usage in (created, read)]
        assert [it["cached_tokens"] for it in details] == [0, 384]
        assert [it["cache_write_tokens"] for it in details] == [384, 0]
        operator = {"authorization": f"Bearer {OPERATOR_TOKEN}"}
        purged = api.post("/cachescope/purge", {"all": True}, key=None, **operator).json()
        assert purged["purged"] == {"device": 3, "cpu": 3}


@pytest.mark.engine
def test_a_real_start_shows_no_secret_and_waits_for_no_store(tiny_model: Path) -> None:
    config = {
        "secret": "sesame, the secret",
        "operator_token": "sesame, the operator's token",
        "cpu_bytes": "64MiB",
        "sweep_interval": "1s",
        # Nobody listens there.
        "tiers": [
            {"type": "redis", "url": "redis://user:sesame-1@127.0.0.1:9/0"},
            {"type": "redis", "name": "other", "url": "redis://127.0.0.1:9/0?password=sesame-2"},
        ],
    }
    arguments = [*transfer(**in_file(config)), *SMALL]
    environment = {"VLLM_LOGGING_LEVEL": "DEBUG", "CACHESCOPE_REDIS_PASSWORD": ""}
    with server(tiny_model, arguments, environment) as started:
        prompt = {"model": MODEL, "prompt": list(range(300, 500)), "max_tokens": 1}
        httpx.post(f"{started.url}/v1/completions", json=prompt).raise_for_status()
        shown = [httpx.get(f"{started.url}{path}").text for path in ("/metrics", "/server_info")]
        for token in (config["operator_token"], "sesame, of another"):
            headers = {"authorization": f"Bearer {token}"}
            for path in ("health", "breaks"):
                answer = httpx.get(f"{started.url}/cachescope/{path}", headers=headers)
                shown.append(answer.text)
        log = started.log_tail(1_000_000)
    for name in ("redis", "other"):
        assert f"Tier {name} at redis://127.0.0.1:9/0 is left alone" in log
    assert "redis://127.0.0.1:9/0" in shown[2] and "Traceback" not in log
    assert "sesame" not in "".join([log, *shown])


OURS = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config={})
DERIVED = SimpleNamespace(
    kv_connector="DrivenConnector",
    kv_connector_module_path="tests.engine.clock",
    kv_connector_extra_config={},
)
SEVERAL = SimpleNamespace(
    kv_connector="MultiConnector",
    kv_connector_extra_config={"connectors": [{"kv_connector": "Other"}, vars(OURS)]},
)
OTHER = SimpleNamespace(kv_connector="OffloadingConnector")
STRANGE = SimpleNamespace(
    kv_connector="OffloadingConnector",
    kv_connector_module_path="vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
)


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module that makes API servers, whose parts are called with what they return."""
    module: Any = ModuleType(attachment._ENTRY)  # noqa: SLF001
    module.build_app = lambda args: SimpleNamespace(state=State(), middlewares=args.middleware)

    async def init_app_state(client: Any, state: Any) -> None:
        state.engine_client = client

    module.init_app_state = init_app_state
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(
    ("configured", "named", "attached"),
    [
        (OURS, [], 1),
        (DERIVED, ["tests.nowhere.Middleware"], 1),
        (vars(OURS), [], 1),
        (SEVERAL, ["starlette.middleware.gzip.GZipMiddleware"], 1),
        (OURS, [NAME], 1),
        (OURS, ["vllm_cachescope.connectors.vllm.api_server.middleware.Middleware"], 0),
        (None, [], 0),
        (OTHER, [], 0),
        (STRANGE, [], 0),
    ],
)
def test_one_argument_attaches_the_api_side_once(
    entry: Any, configured: object, named: list[str], attached: int
) -> None:
    for _ in range(2):
        attachment.install()
    args = SimpleNamespace(kv_transfer_config=configured, middleware=named)
    app = entry.build_app(args)
    assert app.middlewares.count(NAME) == attached
    assert set(named) <= set(app.middlewares)
    assert hasattr(app.state, "cachescope") == (configured not in (None, OTHER, STRANGE))


async def test_what_cannot_be_attached_to_stops_the_start(entry: Any) -> None:
    attachment.require()
    app = entry.build_app(SimpleNamespace(kv_transfer_config=OURS, middleware=[]))
    with pytest.raises(ConfigError, match=r"cannot be attached to: AttributeError.*vllm_config"):
        await entry.init_app_state(object(), app.state)
    # Others' servers are left alone.
    await entry.init_app_state(object(), State())


def test_an_api_server_of_another_shape_stops_the_start(entry: Any) -> None:
    del entry.build_app
    attachment.install()
    with pytest.raises(ConfigError, match=r"no vllm\.entrypoints.*entry with build_app"):
        attachment.require()


@pytest.mark.parametrize("transfer", [None, OTHER], ids=str)
def test_the_middleware_alone_is_a_mistake(transfer: object) -> None:
    with pytest.raises(ConfigError, match="--kv-transfer-config does not"):
        config_check.read(transfer)


def test_shared_tiers_without_a_secret_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    # As the plugin makes one up for a server whose operator set none.
    monkeypatch.setenv("CACHESCOPE_SECRET", "made-up-0123456789abcdef")
    extra = {"tiers": [{"type": "redis", "url": "redis://127.0.0.1"}]}
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=extra)
    with pytest.raises(ConfigError, match="must have the same; set secret"):
        config_check.read(transfer)
