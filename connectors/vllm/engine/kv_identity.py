"""The identity of KV: what two engines must have in common to use each other's blocks."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_offload.config import OffloadingConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Suffixes of the files that hold weights."""

_SAMPLES = 256
_SAMPLE_BYTES = 4096


def model_identity(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the names of the model and of the settings that it is served with, as plain data."""
    model = vllm_config.model_config
    hf_config = model.hf_config.to_dict()
    commit = getattr(model.hf_config, "_commit_hash", None) or hf_config.pop("_commit_hash", None)
    # Both may differ between machines with equal weights.
    for name in ("_name_or_path", "transformers_version"):
        hf_config.pop(name, None)
    return {
        "model": str(model.model),
        "revision": commit or model.revision,
        "architecture": json.loads(json.dumps(hf_config, default=str)),
        "quantization": model.quantization,
        "dtype": str(model.dtype),
        "kv_dtype": vllm_config.cache_config.cache_dtype,
        "hash": vllm_config.cache_config.prefix_caching_hash_algo,
        "attention": str(vllm_config.attention_config.backend),
        "device": current_platform.device_type,
        "vllm": ".".join(vllm.__version__.split(".")[:2]),
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
    if os.path.isdir(model["model"]):
        # A path says nothing about what is there, and replicas may have it elsewhere.
        identity["model"] = None
        identity["weights"] = weights_digest(Path(model["model"]))
    return identity


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
