"""Common prefixes, and positions found through special tokens instead of by tokenising."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.prompt.boundaries import SpecialTokens, common_prefix, last_within

SPECIAL = {"<|a|>": 1, "<|b|>": 2, "<|b|>>": 3}
tokens = SpecialTokens(SPECIAL)


def tokenize(text: str) -> list[int]:
    """A tokenizer that cuts out special tokens, the longest first, and takes letters for ids."""
    ids = []
    while text:
        for special in sorted(SPECIAL, key=len, reverse=True):
            if text.startswith(special):
                ids.append(SPECIAL[special])
                text = text[len(special) :]
                break
        else:
            ids.append(100 + ord(text[0]))
            text = text[1:]
    return ids


pieces = st.lists(st.sampled_from([*SPECIAL, "x", "yy", "<|", ">"]), max_size=12).map("".join)


@given(pieces, pieces, pieces)
def test_common_prefix_is_the_longest(start: str, one: str, other: str) -> None:
    a, b = start + one, start + other
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length in (len(a), len(b)) or a[length] != b[length]


@given(pieces, st.integers(0, 40))
def test_the_anchor_is_a_special_token_at_both_positions(text: str, end: int) -> None:
    ids = tokenize(text)
    found = last_within(tokens.landmarks(text, ids), end)
    starts = [i for i in range(len(text)) if tokenize(text[:i]) + tokenize(text[i:]) == ids]
    inside = [
        i
        for i in starts
        for special in SPECIAL
        if tokenize(text[i:])[:1] == [SPECIAL[special]] and i + len(special) <= end
    ]
    if not inside:
        assert found is None
    else:
        assert found is not None
        assert found.start == max(inside)
        assert tokenize(text[: found.start]) == ids[: found.token]


def test_tokens_that_the_tokenizer_puts_in_front_are_skipped() -> None:
    assert tokens.landmarks("x<|a|>y", [2, *tokenize("x<|a|>y")]) == [(1, 6, 2)]


def test_text_and_tokens_that_disagree_give_no_landmark() -> None:
    ids = tokenize("x<|a|>y")
    assert tokens.landmarks("x<|a|>y", [*ids, 2]) == [], "a special token the text lacks"
    assert tokens.landmarks("x<|a|>y", ids[:1]) == [], "one the tokens lack"
    assert tokens.landmarks("x<|a|>y", [ids[0], 2, ids[2]]) == [], "another one"
    assert SpecialTokens({}).landmarks("x", [120]) == []
