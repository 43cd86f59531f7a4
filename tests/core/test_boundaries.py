"""Common prefixes, and positions found through special tokens instead of by tokenising."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.boundaries import SpecialTokens, common_prefix

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
    found = tokens.last_within(text, end, ids)
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
        character, token = found  # type: ignore[misc]
        assert character == max(inside)
        assert tokenize(text[:character]) == ids[:token]


def test_tokens_that_the_tokenizer_puts_in_front_are_skipped() -> None:
    assert tokens.last_within("x<|a|>y", 7, [2, *tokenize("x<|a|>y")]) == (1, 2)


def test_text_and_tokens_that_disagree_give_no_anchor() -> None:
    ids = tokenize("x<|a|>y")
    assert tokens.last_within("x<|a|>y", 7, [*ids, 2]) is None, "a special token the text lacks"
    assert tokens.last_within("x<|a|>y", 7, ids[:1]) is None, "one the tokens lack"
    assert tokens.last_within("x<|a|>y", 7, [ids[0], 2, ids[2]]) is None, "another one"
    assert SpecialTokens({}).last_within("x", 1, [120]) is None
