"""Prompts tokenised from where their beginning is known, with tokenizers of every make."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from vllm_cachescope.connectors.vllm.api_server.tokenizing import known_tokens_of
from vllm_cachescope.prompt.boundaries import SpecialTokens
from vllm_cachescope.prompt.known_tokens import KnownTokens
from vllm_cachescope.tenancy.scope import Caller

ACME = Caller("acme", "s")

SPECIAL = ["<|start|>", "<|end|>", "<|end|>ing", "[INST]", "<s>"]

WORDS = ["the tide", " the tide", "tide", " ", "  ", "\n", "\n\n", "é", "𝄞", "漢字", "ﬁ", "İ",
         "<|", "|>", "<|start", "x", "<s", ".", "…", "\u200b", "_", "▁"]  # fmt: skip

CORPUS = ["the tide turns at six and the gate is shut", "漢字 and é and ﬁ", "a b c d e f"] * 20


def byte_level(add_prefix_space: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def unigram(prepend_scheme: str) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def prepended() -> Tokenizer:
    """As Llama's was at first."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


KINDS = {
    "byte-level": lambda: byte_level(False),
    "byte-level, with a space in front": lambda: byte_level(True),
    "unigram, first": lambda: unigram("first"),
    "unigram, always": lambda: unigram("always"),
    "unigram, never": lambda: unigram("never"),
    "prepended": prepended,
    "word pieces": word_piece,
}

STRIPS: dict[str, dict[str, bool]] = {
    "plain": {},
    "rstrip": {"rstrip": True},
    "lstrip": {"lstrip": True},
    "single word": {"single_word": True},
    "normalized": {"normalized": True},
}
"""How one of the special tokens is found, where all others are found as they stand."""


def tokenizer_of(kind: str, odd: str) -> PreTrainedTokenizerFast:
    made = KINDS[kind]()
    for number, text in enumerate(SPECIAL):
        options = {"normalized": False} | (STRIPS[odd] if number == 1 else {})
        made.add_special_tokens([AddedToken(text, **options)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def tokenizers() -> dict[tuple[str, str], PreTrainedTokenizerFast]:
    return {(kind, odd): tokenizer_of(kind, odd) for kind in KINDS for odd in STRIPS}


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def known_of(tokenizer: Any) -> KnownTokens:
    known = known_tokens_of(SimpleNamespace(tokenizer=tokenizer), 2**20)
    assert known is not None
    return known


def asked(known: KnownTokens, tokenizer: Any, text: str, caller: Caller = ACME) -> int:
    """Tokenise a text from where it is known, and keep it; return how much of it was known, in
    characters."""
    cuts = known.cuts(text)
    beginning = known.find(caller, cuts)
    start = 0 if beginning is None else cuts.starts[beginning.cut]
    rest = ids(tokenizer, text[start:])
    before = [] if beginning is None else list(beginning.tokens)
    assert before + rest == ids(tokenizer, text), (text, start)
    known.keep(caller, cuts, rest, beginning)
    return start


texts = st.lists(st.sampled_from([*SPECIAL, *WORDS]), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", STRIPS)
@given(texts, texts, texts, st.booleans())
def test_tokens_are_those_of_the_text_as_a_whole(
    tokenizers, kind, odd, first, second, third, follows
) -> None:
    tokenizer = tokenizers[kind, odd]
    known = known_of(tokenizer)
    asked(known, tokenizer, "".join(first))
    longer = [*first, *second]
    asked(known, tokenizer, "".join(longer))
    asked(known, tokenizer, "".join([*(longer if follows else first), *third]))


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte-level", "plain"]


def turns(seed: int, count: int) -> list[str]:
    """A conversation as its turns find it, each with what opens the answer."""
    chance = random.Random(seed)
    said, found = "", []
    for _ in range(count):
        words = " ".join(chance.choice(WORDS) for _ in range(200))
        said += f"<|start|>user\n{words}<|end|>\n"
        found.append(said + "<|start|>assistant\n")
        said += f"<|start|>assistant\nIt turns at {chance.random()}.<|end|>\n"
    return found


def test_a_conversation_is_known_up_to_the_answer_before(tokenizer) -> None:
    known, before = known_of(tokenizer), ""
    for text in turns(0, 12):
        assert asked(known, tokenizer, text) == max(0, before.rfind("<|start|>"))
        before = text


def test_a_history_that_is_rendered_anew_is_known_up_to_near_where_it_changes(tokenizer) -> None:
    known, prompts = known_of(tokenizer), turns(1, 12)
    for text in prompts:
        asked(known, tokenizer, text)
    # As templates do that leave out what the model thought, once its turn is over.
    changed = prompts[-1].replace("It turns at", "", 9).replace("<|start|>assistant\n 0", "!", 1)
    divergence = next(
        i for i, (a, b) in enumerate(zip(changed, prompts[-1], strict=False)) if a != b
    )
    assert 0 <= asked(known, tokenizer, changed) <= divergence
    last = prompts[-1].rfind("It turns at")
    changed = prompts[-1][:last] + prompts[-1][last:].replace("It turns at", "At")
    assert asked(known, tokenizer, changed) == prompts[-1].rfind("<|start|>", 0, last)


def test_nobody_else_finds_a_sessions_tokens(tokenizer) -> None:
    known, (text,) = known_of(tokenizer), turns(2, 1)
    assert asked(known, tokenizer, text) == 0
    for other in (Caller("acme", "t"), Caller("acme", None), Caller("zeta", "s")):
        assert known.find(other, known.cuts(text)) is None
    assert asked(known, tokenizer, text) > 0


def test_what_is_purged_is_not_known(tokenizer) -> None:
    text = turns(3, 1)[0]
    for org, session in ((None, None), ("acme", None), ("acme", "s")):
        known = known_of(tokenizer)
        asked(known, tokenizer, text)
        known.purge("zeta")
        known.purge("acme", "t")
        assert known.nbytes > 0
        known.purge(org, session)
        assert known.nbytes == 0 and known.find(ACME, known.cuts(text)) is None


def test_memory_is_bounded_and_goes_by_last_use(tokenizer) -> None:
    known = KnownTokens(
        SpecialTokens({"<|start|>": tokenizer.convert_tokens_to_ids("<|start|>")}), limit=60_000
    )
    prompts = [turns(seed, 1)[0] for seed in range(40)]
    for number, text in enumerate(prompts):
        cuts = known.cuts(text)
        known.keep(Caller("acme", str(number)), cuts, ids(tokenizer, text))
        known.find(Caller("acme", "0"), known.cuts(prompts[0]))
        assert known.nbytes <= 60_000
    held = [
        known.find(Caller("acme", str(number)), known.cuts(text)) is not None
        for number, text in enumerate(prompts)
    ]
    assert held[0] and held[-1] and not held[1] and sum(held) < 40


def test_a_prompts_tokens_go_with_its_last_cut(tokenizer) -> None:
    """Those in front of the others are a part of them, and cannot outlive the bound."""
    known, prompts = known_of(tokenizer), turns(6, 8)
    text = prompts[-1]
    cuts = known.cuts(text)
    known.keep(ACME, cuts, ids(tokenizer, text))
    earlier = known.cuts(text[: cuts.starts[-4] + 1] + "|start|>")
    found = known.find(ACME, earlier)
    assert found is not None and found.cut == len(cuts.starts) - 4
    known._known.purge("acme", lambda key, _: key[1] == cuts.hashes[-1])  # noqa: SLF001
    assert known.find(ACME, earlier) is None


def test_a_tokenizer_that_does_not_cut_its_tokens_out_is_not_relied_on(tokenizer) -> None:
    """What it makes of a text has other special tokens than the text."""
    known, text = known_of(tokenizer), turns(4, 1)[0]
    cuts = known.cuts(text)
    tokens = ids(tokenizer, text)
    tokens.remove(tokenizer.convert_tokens_to_ids("<|end|>"))
    known.keep(ACME, cuts, tokens)
    assert known.find(ACME, cuts) is None


def test_of_a_text_of_nothing_but_special_tokens_the_last_ones_count(tokenizer) -> None:
    known, text = known_of(tokenizer), "<|start|>" * 10_000
    assert asked(known, tokenizer, text) == 0
    assert asked(known, tokenizer, text) == len("<|start|>") * 9_999


@pytest.mark.parametrize(
    "tokenizer", [SimpleNamespace(is_fast=False), None, SimpleNamespace(is_fast=True)]
)
def test_tokenizers_without_tokens_to_cut_at_are_left_alone(tokenizer) -> None:
    assert known_tokens_of(SimpleNamespace(tokenizer=tokenizer), 2**20) is None


def test_without_memory_nothing_is_kept(tokenizer) -> None:
    assert known_tokens_of(SimpleNamespace(tokenizer=tokenizer), 0) is None


def test_tokens_are_kept_for_an_hour(tokenizer) -> None:
    now = [0.0]
    ids_of = {"<|start|>": tokenizer.convert_tokens_to_ids("<|start|>")}
    known = KnownTokens(SpecialTokens(ids_of), limit=2**20, clock=lambda: now[0])
    first, second = turns(5, 2)
    asked(known, tokenizer, first)
    now[0] = 1800.0
    assert asked(known, tokenizer, second) > 0
    now[0] = 3601.0
    assert known.find(ACME, known.cuts(first)) is None
    assert known.find(ACME, known.cuts(second)) is not None
    now[0] = 5401.0
    assert known.find(ACME, known.cuts(second)) is None
    assert known.nbytes == 0
