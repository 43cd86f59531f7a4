"""``cachescope check`` on a real vLLM: what it finds of a model without loading it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine import forks
from tests.engine.server import ENVIRONMENT
from vllm_cachescope.connectors.vllm.hooks import HOOKS

pytestmark = pytest.mark.engine

HYBRID = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "torch_dtype": "bfloat16",
}
"""Three layers of linear attention to one of full attention. An engine says of it: "Setting
attention block size to 640 tokens"."""


def check(scratch: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run ``cachescope check --json``; return its exit status, and its findings by subject."""
    log = scratch / "log"
    log.unlink(missing_ok=True)
    command = ["vllm_cachescope", "check", *arguments, "--json"]
    status = forks.Command(command, os.environ | ENVIRONMENT, log).wait(60)
    said = log.read_text()
    findings = json.loads(said[said.index('{\n  "findings"') :])["findings"]
    return status, {finding["subject"]: finding for finding in findings}


def test_a_launch_that_will_do(tiny_model: Path, tmp_path: Path) -> None:
    status, found = check(tmp_path, str(tiny_model), "--max-model-len", "4096")
    assert status == 0 and {it["status"] for it in found.values()} == {"ok"}, found
    assert list(found) == [
        *("configuration", "vLLM"),
        *(f"hook: {hook.name}" for hook in HOOKS),
        *("scoped hashes", "cpu_bytes", "front end"),
        *("model", "enable_prefix_caching", "block length"),
    ]
    assert found["block length"]["found"] == "128 tokens"


def test_a_model_whose_blocks_are_long(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    status, found = check(tmp_path, "--model", str(tmp_path), "--grpc")
    assert status == 0
    assert found["block length"]["status"] == found["front end"]["status"] == "warning"
    assert found["block length"]["found"].startswith("640 tokens: only whole blocks are cached")
    assert found["front end"]["found"].startswith("vLLM's gRPC server; it reads no marks")


def test_parts_of_blocks_would_never_expire(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    status, found = check(tmp_path, "--model", str(tmp_path), "--prefix-match-unit", "64")
    assert status == 1
    assert found["prefix_match_unit"]["found"].startswith("with 64, parts of this model's blocks")


def test_what_will_not_do_is_found_all_at_once(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret of the tests")
    (tmp_path / "secret").chmod(0o644)
    tiers = "[{type: redis, url: redis://127.0.0.1:9, timeout: 1s}]"
    keys = (f"tiers={tiers}", f"secret_file={tmp_path / 'secret'}", "cpu_bytes=100TiB")
    status, found = check(
        tmp_path,
        str(tiny_model),
        *(f"--set={key}" for key in keys),
        *("--no-enable-prefix-caching", "--max-model-len", "4096"),
    )
    failed = {name: it["found"] for name, it in found.items() if it["status"] == "failure"}
    assert status == 1 and list(failed) == ["cpu_bytes", "tier redis", "enable_prefix_caching"]
    assert failed["tier redis"].startswith("redis://127.0.0.1:9 does not answer: ")
    assert found["secret_file"]["status"] == "warning"
    assert found["package redis"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "subject", "says"),
    [
        (["nowhere/at-all"], "model", "at-all"),
        (["nowhere", "--prot", "9000x", "--nonsense"], "vLLM's arguments", "--nonsense"),
        (["nowhere", "--set", "cpu_bites=1"], "configuration", "cpu_bites: there is no such key"),
    ],
)
def test_what_vllm_does_not_take_is_a_finding(
    tmp_path: Path, arguments: list[str], subject: str, says: str
) -> None:
    status, found = check(tmp_path, *arguments)
    assert status == 1 and found[subject]["status"] == "failure"
    assert says in found[subject]["found"]
