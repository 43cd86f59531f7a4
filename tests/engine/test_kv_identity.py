"""Which of vLLM's settings keep two engines from using each other's blocks in a remote tier."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import KVTransferConfig

from tests.engine.engine import SECRET
from vllm_cachescope.config import CONNECTOR, ConfigError, load
from vllm_cachescope.connectors.vllm.engine.kv_identity import model_identity
from vllm_cachescope.connectors.vllm.engine.offloading import for_offloading
from vllm_cachescope.tiers.keyspace import Keyspace

pytestmark = pytest.mark.engine

ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}

CHANGES_KV: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "dtype of the KV": {"kv_cache_dtype": "fp8"},
    "layers with KV of another dtype": {"kv_cache_dtype_skip_layers": ["0"]},
    "positions": {"hf_overrides": ROPE},
    "the architecture": {"hf_overrides": {"rms_norm_eps": 1e-3}},
    "the hash of blocks": {"prefix_caching_hash_algo": "sha256_cbor"},
    "the kernels of attention": {"attention_backend": "CPU_ATTN"},
    "a setting of attention": {"attention_config": {"flash_attn_version": 2}},
    "random weights": {"load_format": "dummy"},
    "revision": {"revision": "abc"},
    "code": {"code_revision": "abc"},
    "dtype of adapters": {"enable_lora": True, "lora_dtype": "bfloat16"},
    "modules of adapters": {"enable_lora": True, "lora_target_modules": ["q_proj"]},
}
CHANGES_NOTHING: dict[str, dict[str, Any]] = {
    "name": {"served_model_name": ["toy", "model"]},
    "length": {"max_model_len": 512},
    "memory": {"num_gpu_blocks_override": 7, "gpu_memory_utilization": 0.5},
    "batches": {"max_num_seqs": 3, "max_num_batched_tokens": 640},
    "seed": {"seed": 7},
    "sampling": {"max_logprobs": 3, "generation_config": "vllm"},
    "the graph": {"enforce_eager": True},
    "adapters": {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2},
    "a guess without a model": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 4,
        }
    },
}


@pytest.fixture
def arguments(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EngineArgs:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return EngineArgs(model=str(tiny_model), dtype="float32")


def namespace(arguments: EngineArgs) -> str:
    return Keyspace(model_identity(arguments.create_engine_config())).namespace


@pytest.mark.parametrize("changed", CHANGES_KV.values(), ids=CHANGES_KV)
def test_a_setting_that_changes_kv_changes_the_names_of_entries(arguments, changed) -> None:
    assert namespace(replace(arguments, **changed)) != namespace(arguments)


@pytest.mark.parametrize("changed", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_engines_that_differ_in_anything_else_share(arguments, changed) -> None:
    assert namespace(replace(arguments, **changed)) == namespace(arguments)


def test_quantised_weights_are_others(arguments) -> None:
    half = replace(arguments, dtype="bfloat16")
    assert namespace(replace(half, quantization="fp8")) != namespace(half)


def test_weights_that_are_replaced_in_a_running_engine_share_nothing(arguments) -> None:
    config = replace(arguments, weight_transfer_config={"backend": "nccl"}).create_engine_config()
    config.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")
    own = load({"secret": SECRET, "tiers": [{"type": "redis", "url": "redis://127.0.0.1:1"}]})
    with pytest.raises(ConfigError, match=r"tiers: .*weight_transfer_config"):
        for_offloading(config, own)
    assert for_offloading(config, load({"secret": SECRET}))


def test_random_weights_are_those_of_a_seed(arguments) -> None:
    one, other = (replace(arguments, load_format="dummy", seed=seed) for seed in (1, 2))
    assert namespace(one) != namespace(other)


def test_two_places_of_one_model_share(arguments, tmp_path) -> None:
    link = tmp_path / "elsewhere"
    link.symlink_to(arguments.model)
    identity = model_identity(replace(arguments, model=str(link)).create_engine_config())
    assert {**identity, "model": arguments.model} == model_identity(
        arguments.create_engine_config()
    )
