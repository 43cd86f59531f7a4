"""The demo's random model: built once, the same each time, and sensitive to its whole prompt."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.model import _SPECIAL_TOKENS, SMALL, TINY, build, train_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build(tmp_path_factory.mktemp("models") / "tiny", TINY)


@pytest.fixture(scope="module")
def generate(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    # The model is so small that threads would mostly wait for each other.
    torch.set_num_threads(1)

    def generate(prompt: list[int], tokens: int = 24) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return out[0, len(prompt) :].tolist()

    return generate


def test_a_complete_model_is_kept_and_another_replaces_it(tmp_path):
    path = build(tmp_path / "model", TINY)
    first = (path / "model.safetensors").read_bytes()
    inode = (path / "model.safetensors").stat().st_ino
    assert build(path, TINY) == path
    assert (path / "model.safetensors").stat().st_ino == inode

    build(path, TINY, seed=1)
    assert (path / "model.safetensors").read_bytes() != first

    (path / "build.json").unlink()  # as if building had been cut short
    build(path, TINY)
    assert (path / "model.safetensors").read_bytes() == first
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_an_unknown_template_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="chatml, inst, headers"):
        build(tmp_path / "model", TINY, template="morse")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("template", "end_of_turn"),
    [("chatml", "<|im_end|>"), ("inst", "</s>"), ("headers", "<|eot_id|>")],
)
def test_the_tokenizer_carries_its_template(tmp_path, template, end_of_turn):
    tokenizer = AutoTokenizer.from_pretrained(build(tmp_path / "model", TINY, template))
    assert tokenizer.eos_token == end_of_turn
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert end_of_turn in prompt or template == "inst"
    for token in _SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1


def test_training_the_tokenizer_again_gives_the_same():
    one, two = (train_tokenizer(TINY.vocab, "</s>").get_vocab() for _ in range(2))
    assert one == two
    assert len(one) == TINY.vocab


def test_text_survives_the_tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "Ünïcode, code:\n\tdef f(x):  return x\n日本語 🚢"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_answers_are_repeatable_printable_and_never_stop_early(tiny, generate):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = [tokenizer(q)["input_ids"] for q in ("Hello there", "Hello here", "A berth, please")]
    answers = [generate(prompt, 64) for prompt in prompts]
    assert answers == [generate(prompt, 64) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) == 3
    for answer in answers:
        assert len(answer) == 64
        assert len(set(answer)) > 8
        text = tokenizer.decode(answer)
        assert text.isascii() and text.isprintable()


def test_tokens_far_back_change_the_answer(generate):
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(300, TINY.vocab, (1200,), generator=random).tolist()
    changed = prompt.copy()
    changed[128:256] = torch.randint(300, TINY.vocab, (128,), generator=random).tolist()
    assert generate(prompt) != generate(changed)


def test_sizes_are_what_the_documentation_says(tmp_path):
    config = json.loads((build(tmp_path / "m", SMALL) / "config.json").read_text())
    per_token = 4 * 2 * SMALL.layers * config["num_key_value_heads"] * config["head_dim"]
    assert per_token == 8 * 1024
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert round(model.num_parameters() / 1e6) == 18
