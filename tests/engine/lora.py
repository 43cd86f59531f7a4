"""Small random LoRA adapters for the tests' model."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.model import TINY

_RANK = 8


def build_adapter(directory: Path, seed: int) -> Path:
    """Write an adapter for `TINY`'s attention to ``directory``, in place of one that is there;
    return the directory. Its weights are large enough to change what the model generates."""
    directory.mkdir(exist_ok=True)
    chance = torch.Generator().manual_seed(seed)
    widths = {
        "q_proj": TINY.heads * TINY.head_dim,
        "k_proj": TINY.kv_heads * TINY.head_dim,
        "v_proj": TINY.kv_heads * TINY.head_dim,
    }
    tensors = {}
    for layer in range(TINY.layers):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(_RANK, TINY.hidden, generator=chance)
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, _RANK, generator=chance)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": list(widths)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
