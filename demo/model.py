"""A random-weight model that vLLM serves like any other, made in seconds without a download.

Its answers mean nothing, but they depend on the whole prompt: attention is sharp enough that a
wrong key or value far back changes what comes out, which is what a test of a cache needs.
"""

import hashlib
import json
import math
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

MODELS = Path(__file__).parents[1] / ".cache" / "models"
"""Where the demo, the tests and the benchmarks keep the models they build."""

TEMPLATES = Path(__file__).parent / "templates"

_END_OF_TURN = {"chatml": "<|im_end|>", "inst": "</s>", "headers": "<|eot_id|>"}
_SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
_CORPUS_BYTES = 2_000_000
_MANIFEST = "build.json"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The shape of a model, and how its random weights are scaled.

    Attributes:
        name: what to call it in paths.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_positions: as in
            a Qwen3 configuration.
        sharpness: weight of the query and key norms. Attention logits have a standard deviation
            of its square; much below 1.5, far tokens hardly matter to the output.
        branch: scale of what a layer adds to the residual stream. The deeper the model, the
            smaller, or rounding errors of the last bit decide between two likely tokens.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    sharpness: float
    branch: float
    max_positions: int = 40_960


TINY = ModelSize(
    name="tiny",
    layers=2,
    hidden=64,
    intermediate=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=2048,
    sharpness=1.7,
    branch=1.0,
)
"""For tests: 0.4 M parameters, 0.5 KiB of KV per token in bf16."""

SMALL = ModelSize(
    name="small",
    layers=4,
    hidden=512,
    intermediate=1152,
    heads=4,
    kv_heads=4,
    head_dim=64,
    vocab=8192,
    sharpness=1.7,
    branch=0.5,
)
"""For the demo and benchmarks: 18 M parameters, 8 KiB of KV per token in float32.

Serve it in float32: a CPU without bfloat16 instructions is several times slower in bfloat16.
"""


def build(path: Path, size: ModelSize, template: str = "chatml", seed: int = 0) -> Path:
    """Make a model directory at ``path`` with weights, tokenizer and chat template; return it.

    A directory already there is kept if it was built from the same arguments by the same code,
    and replaced otherwise. It appears complete or not at all. Weights are stored in bfloat16.

    Special tokens, and tokens that are not printable ASCII, are never generated: an answer runs
    to its ``max_tokens``, and each of its tokens can be streamed as it comes.

    Raises:
        ValueError: if there is no chat template of that name.
    """
    if template not in _END_OF_TURN:
        raise ValueError(f"no template {template!r}; there are {', '.join(_END_OF_TURN)}")
    chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    manifest: dict[str, object] = {
        "size": asdict(size),
        "template": template,
        "seed": seed,
        "recipe": _digest(chat_template, Path(__file__).read_text()),
    }

    def fill(directory: Path) -> None:
        tokenizer = train_tokenizer(size.vocab, _END_OF_TURN[template])
        tokenizer.chat_template = chat_template
        tokenizer.model_max_length = size.max_positions
        tokenizer.save_pretrained(directory)
        save(_random_model(size, tokenizer, seed), directory)

    return build_directory(path, manifest, fill)


def build_directory(path: Path, manifest: dict[str, object], fill: Callable[[Path], None]) -> Path:
    """Have ``fill`` fill a model directory at ``path``; return it.

    A directory already there is kept if it was built with the same ``manifest``, and replaced
    otherwise. It appears complete or not at all.

    Args:
        path: where the directory goes.
        manifest: everything that its content depends on, as plain data.
        fill: called with the directory to fill.
    """
    if _is_built(path, manifest):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(scratch)
        (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        scratch.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.rename(scratch, path)
        except OSError:
            # Another process may have put the same model there in the meantime.
            if not _is_built(path, manifest):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def save(model: PreTrainedModel, directory: Path) -> None:
    """Write a model's configuration and weights into ``directory``, in bfloat16."""
    with _no_progress_bar():
        model.to(torch.bfloat16).save_pretrained(directory)


def train_tokenizer(vocab: int, end_of_turn: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocab`` entries, trained on Python's own library.

    The same interpreter gives the same tokenizer each time; another version of Python, with
    another standard library, gives a slightly different one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_of_turn,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> Iterator[str]:
    left = _CORPUS_BYTES
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = source.read_text(encoding="utf-8", errors="replace")[:left]
        yield text
        left -= len(text)
        if left == 0:
            return


def _random_model(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(size.sharpness)
            elif "norm" in name:
                weight.fill_(1.0)
            elif "embed_tokens" in name:
                weight.normal_(generator=random)
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = size.branch if into_residual else 1.0
                weight.normal_(0.0, scale / math.sqrt(weight.shape[1]), generator=random)
        # A row of zeros gives a logit of 0, which the best of thousands always beats.
        model.lm_head.weight[_unprintable(tokenizer)] = 0.0
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _unprintable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL_TOKENS
    }
    texts = ((token, tokenizer.decode([token])) for token in range(len(tokenizer)))
    return [
        token
        for token, text in texts
        if token in special or not (text.isascii() and text.isprintable())
    ]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Saving takes no time, and its bar would break into the demo's own."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _is_built(path: Path, manifest: dict[str, object]) -> bool:
    try:
        return bool(json.loads((path / _MANIFEST).read_text()) == manifest)
    except (OSError, ValueError):
        return False


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
