"""The identity of KV: what two engines must have in common to use each other's blocks."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.config.utils import get_hash_factors, normalize_value
from vllm.platforms import current_platform
from vllm.v1.kv_offload.config import OffloadingConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Suffixes of the files that hold weights."""

_SAMPLES = 256
_SAMPLE_BYTES = 4096


_NOT_IN_KV = {
    # They come from other sources below.
    *("model", "model_weights", "revision", "hf_config", "hf_text_config", "multimodal_config"),
    # They made `hf_config` what it is.
    *("hf_config_path", "hf_overrides", "config_format"),
    # Tokens are in the hash, however they came about.
    *("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"),
    *("enable_prompt_embeds", "allowed_local_media_path", "allowed_media_domains"),
    # What follows the last hidden state.
    *("max_logprobs", "logprobs_mode", "logits_processors", "use_fp64_gumbel", "pooler_config"),
    *("generation_config", "override_generation_config", "return_sampling_mask"),
    *("seed", "io_processor_plugin"),
    # How the server runs.
    *("served_model_name", "hf_token", "max_model_len", "spec_target_max_model_len"),
    *("renderer_num_workers", "enforce_eager", "enable_trace_replay", "disable_cascade_attn"),
    *("enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend"),
    *("sleep_mode_offload_cudagraph", "enable_nccl_comm_suspend", "enable_cumem_allocator"),
    *("allow_deprecated_quantization", "trust_remote_code"),
}
"""Fields of vLLM's `ModelConfig` that no block's bytes depend on. A field that is not known here
counts: engines that differ in it share nothing."""

_MEDIA_NOT_IN_KV = {
    *("limit_per_prompt", "mm_processor_cache_gb", "mm_processor_cache_type"),
    *("mm_shm_cache_max_object_size_mb", "mm_encoder_tp_mode", "interleave_mm_strings"),
    *("skip_mm_profiling", "mm_tensor_ipc", "mm_ipc_gpu_memory_gb"),
}
"""The same of `MultiModalConfig`."""

_CACHE_IN_KV = (
    *("cache_dtype", "kv_cache_dtype_skip_layers", "prefix_caching_hash_algo", "sliding_window"),
    *("mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_cache_mode", "use_replayssm"),
    *("kv_sharing_fast_prefill", "swa_bounded_replay"),
)
"""Fields of `CacheConfig` that the bytes depend on. Most others are sizes of one cache."""


def model_identity(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the names of the model and of the settings that its KV depends on, as plain data."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    identity = {
        **_source(model),
        "model_settings": get_hash_factors(model, _NOT_IN_KV),
        "cache": {name: _plain(getattr(cache, name, None)) for name in _CACHE_IN_KV},
        "attention": get_hash_factors(vllm_config.attention_config, set()),
        "mamba": _plain(getattr(vllm_config, "mamba_config", None)),
        "media": model.multimodal_config
        and get_hash_factors(model.multimodal_config, _MEDIA_NOT_IN_KV),
        "load_format": str(vllm_config.load_config.load_format),
        "lora": _lora_settings(vllm_config),
        "draft": _draft(vllm_config),
        "platform": _plain(vllm_config.additional_config),
        "device": current_platform.device_type,
        "vllm": ".".join(vllm.__version__.split(".")[:2]),
    }
    if vllm_config.load_config.load_format == "dummy":
        # Weights are drawn at random.
        identity["seed"] = model.seed
    if getattr(cache, "calculate_kv_scales", False):
        # The first prompt decides how this engine's numbers are scaled.
        identity["scales"] = secrets.token_hex(16)
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _plain(value: Any) -> Any:
    return normalize_value(value)  # type: ignore[no-untyped-call]


def _source(model: Any) -> dict[str, Any]:
    """Return which model it is, and its architecture."""
    architecture = model.hf_config.to_dict()
    commit = getattr(model.hf_config, "_commit_hash", None) or architecture.pop(
        "_commit_hash", None
    )
    # Both may differ between machines with equal weights.
    for name in ("_name_or_path", "transformers_version"):
        architecture.pop(name, None)
    return {
        "model": str(model.model_weights or model.model),
        "revision": commit or model.revision,
        "architecture": architecture,
    }


def _lora_settings(vllm_config: VllmConfig) -> list[Any] | None:
    """Return the settings that adapters are computed with; None for the defaults, with which an
    engine shares prompts without an adapter with engines that take none."""
    lora = vllm_config.lora_config
    if lora is None:
        return None
    own_dtype = lora.lora_dtype not in ("auto", None, vllm_config.model_config.dtype)
    settings = [
        str(lora.lora_dtype) if own_dtype else None,
        sorted(lora.target_modules or ()) or None,
        getattr(lora, "enable_tower_connector_lora", None) or None,
    ]
    return settings if any(settings) else None


def _draft(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """Return the model that drafts tokens and keeps KV of its own; None if none does."""
    speculative: Any = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or speculative.method in ("ngram", "ngram_gpu", "suffix"):
        return None
    return {
        **_source(draft),
        "method": speculative.method,
        "settings": get_hash_factors(draft, _NOT_IN_KV),
        "weights": _weights(str(draft.model)),
    }


def kv_identity(model: dict[str, Any], config: OffloadingConfig) -> dict[str, Any]:
    """Return `model_identity` together with how a block's bytes are laid out."""
    identity = {
        **model,
        "groups": [[g.tokens_per_block, list(g.layer_names)] for g in config.groups],
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "bytes_per_block": config.worker_kv_bytes_per_block,
        "parallel": [
            config.parallel.world_size,
            config.parallel.tp_size,
            config.parallel.pp_size,
            config.parallel.pcp_size,
            config.parallel.dcp_size,
        ],
        "layout": [
            config.kv_cache_layout,
            config.replicated_layout,
            getattr(config, "canonical_layout", False),
        ],
    }
    if (weights := _weights(model["model"])) is not None:
        # A path says nothing about what is there, and replicas may have it elsewhere.
        identity["model"], identity["weights"] = None, weights
    return identity


def _weights(model: str) -> str | None:
    """Return a digest of the weights if ``model`` is a directory; None if it is a name."""
    return weights_digest(Path(model)) if os.path.isdir(model) else None


def weights_digest(directory: Path) -> str:
    """Return a digest of the weights in ``directory``: of names, sizes, and of samples all over
    each file, so that it takes no longer for a large model than for a small one."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in WEIGHT_SUFFIXES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\n{size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            step = max(_SAMPLE_BYTES, size // _SAMPLES)
            for position in range(0, size, step):
                file.seek(position)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
