"""A mistake in the configuration stops the start with one message, and vLLM's traceback stays out
of it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm import startup


def test_vllms_own_command_stops_with_one_message(tmp_path: Path) -> None:
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bites": 1},
    }
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--kv-transfer-config", json.dumps(transfer)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1
    assert "cpu_bites: there is no such key (value 1); allowed: chunk_tokens" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout


@pytest.mark.parametrize(
    "transfer", [None, SimpleNamespace(kv_connector="OffloadingConnector")], ids=str
)
def test_the_middleware_alone_is_a_mistake(transfer: object) -> None:
    with pytest.raises(ConfigError, match="--kv-transfer-config does not"):
        startup.read(transfer)


def test_shared_tiers_without_a_secret_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    # As the plugin makes one up for a server whose operator set none.
    monkeypatch.setenv("CACHESCOPE_SECRET", "made-up-0123456789abcdef")
    extra = {"tiers": [{"type": "redis", "url": "redis://127.0.0.1"}]}
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=extra)
    with pytest.raises(ConfigError, match="must have the same; set secret"):
        startup.read(transfer)
