"""A mistake in the configuration stops the start with one message, and vLLM's traceback stays out
of it."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engine.engine import BLOCK_BYTES
from tests.engine.server import ENVIRONMENT
from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm import config_check, shm_regions


def start(model: Path, **extra: object) -> "subprocess.CompletedProcess[str]":
    """Run vLLM's own command with ``extra`` configuration that stops it."""
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--dtype", "float32", "--enforce-eager", "--num-gpu-blocks-override", "40"),
            *("--max-model-len", "512", "--kv-transfer-config", json.dumps(transfer)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | ENVIRONMENT,
    )


@pytest.mark.engine
def test_vllms_own_command_stops_with_one_message(tiny_model: Path) -> None:
    before = set(Path("/dev/shm").glob("vllm_offload_*"))
    with ThreadPoolExecutor() as pool:
        misspelt = pool.submit(start, tiny_model, cpu_bites=1)
        # How much a chunk takes is known to the engine only.
        too_small = pool.submit(start, tiny_model, cpu_bytes=4096)
    for ended, expected in (
        (misspelt.result(), "cpu_bites: there is no such key (value 1); allowed: chunk_tokens, "),
        (
            too_small.result(),
            "cpu_bytes: 4096 holds not even one chunk; "
            f"allowed: {BLOCK_BYTES} or more with this model and block size",
        ),
    ):
        said = ended.stderr + ended.stdout
        assert ended.returncode == 1
        found = re.findall("^CacheScope configuration: (.*)$", said, re.MULTILINE)
        assert len(found) == 1 and found[0].startswith(expected), found
        assert "Traceback" not in said
    shm_regions.remove_stale()
    assert set(Path("/dev/shm").glob("vllm_offload_*")) <= before


@pytest.mark.parametrize(
    "transfer", [None, SimpleNamespace(kv_connector="OffloadingConnector")], ids=str
)
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
