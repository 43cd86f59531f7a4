"""Kinds of models: one tiny random-weight model of each way in which vLLM keeps KV."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    DeepseekV3Config,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from demo.model import MODELS, build_directory, save, train_tokenizer

_COMMON = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SHARPNESS = 1.7
"""As in `demo.model`: attention that is sharp enough for far tokens to matter."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model.

    Attributes:
        name: what to call it, also in paths.
        config: returns its configuration, of some other class for each kind.
        block: tokens per block, on the device and in the CPU tier.
        block_bytes: bytes of a block, whichever group it belongs to.
        groups: how many KV cache groups it has.
        has_checkpoints: whether a prompt can be resumed at some blocks' ends only.
        runs: whether this machine's vLLM caches its prefixes.
        is_exact: whether no rounding decides between two tokens, whether a prompt's beginning is
            read or computed. On the CPU vLLM reads latent KV with another kernel than it computes
            with, in bfloat16: its own log probabilities differ by up to 0.1.
        options: further engine arguments.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    block: int
    block_bytes: int
    groups: int = 1
    has_checkpoints: bool = False
    runs: bool = True
    is_exact: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Path:
        """Make the model's directory, or find it made; return it. It has no tokenizer."""
        config = self.config()
        recipe = inspect.getsource(inspect.getmodule(Kind))  # type: ignore[arg-type]
        manifest = {"config": config.to_dict(), "recipe": recipe}
        return build_directory(
            MODELS / f"kind-{self.name}", manifest, lambda path: save(_random(config), path)
        )


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    normed = False
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Some add 1 to the weight, and have begun at 0.
                weight.add_(_SHARPNESS - 1)
                normed = True
            elif "embed_tokens" in name:
                weight.normal_()
            elif weight.dim() > 1 and "conv1d" not in name:
                weight.normal_(0.0, 1 / math.sqrt(weight.shape[-1]))
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight") and not normed:
                weight.mul_(_SHARPNESS**2)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model


def _sliding() -> PreTrainedConfig:
    return Gemma3TextConfig(
        **_COMMON,
        **_HEADS,
        intermediate_size=128,
        num_hidden_layers=4,
        query_pre_attn_scalar=32,
        sliding_window=256,
        layer_types=[*["sliding_attention"] * 3, "full_attention"],
    )


def _sliding_experts() -> PreTrainedConfig:
    return GptOssConfig(
        **_COMMON,
        **_HEADS,
        intermediate_size=64,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )


def _linear() -> PreTrainedConfig:
    return Qwen3NextConfig(
        **_COMMON,
        **_HEADS,
        **_EXPERTS,
        intermediate_size=128,
        shared_expert_intermediate_size=64,
        num_hidden_layers=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    )


def _latent() -> PreTrainedConfig:
    return DeepseekV3Config(
        **_COMMON,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        # The only widths that vLLM's kernel for CPUs knows.
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )


def _experts() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_COMMON, **_HEADS, **_EXPERTS, intermediate_size=128, num_hidden_layers=2
    )


_BF16 = {"dtype": "bfloat16"}

KINDS = (
    Kind("sliding", _sliding, 128, 65_536, groups=4, has_checkpoints=True),
    Kind("sliding-experts", _sliding_experts, 128, 131_072, groups=2, has_checkpoints=True),
    Kind("linear", _linear, 256, 65_536, groups=4, has_checkpoints=True, options=_BF16),
    # On a CPU without these tiles vLLM's kernel cannot go on from what is cached, and vLLM turns
    # prefix caching off for latent attention.
    Kind(
        "latent",
        _latent,
        128,
        294_912,
        runs=torch.cpu._is_amx_tile_supported(),  # noqa: SLF001
        is_exact=False,
        options=_BF16,
    ),
    Kind("experts", _experts, 128, 131_072),
)


def build_seeing() -> Path:
    """Make the directory of a model that sees pictures of 56 x 56 pixels, or find it made; return
    it. It is of the one family whose code in vLLM imports no torchvision."""
    return build_directory(
        MODELS / "kind-seeing",
        {"recipe": inspect.getsource(inspect.getmodule(Kind))},  # type: ignore[arg-type]
        _fill_seeing,
    )


def _fill_seeing(directory: Path) -> None:
    tokenizer = train_tokenizer(2048, "<|im_end|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>"], "bos_token": "<s>"}  # type: ignore[dict-item]
    )
    tokenizer.save_pretrained(directory)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "intermediate_size": 64, "image_size": 56, "patch_size": 14},
        qformer_config={
            **small,
            "vocab_size": 64,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 32,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 2112,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 4200,
            "eos_token_id": 1,
            "bos_token_id": 0,
        },
        num_query_tokens=8,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    save(Blip2ForConditionalGeneration(config), directory)
    half = [0.5, 0.5, 0.5]
    pictures = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "size": {"height": 56, "width": 56},
        "image_mean": half,
        "image_std": half,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures))
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": 8}
    (directory / "processor_config.json").write_text(json.dumps(processor))
