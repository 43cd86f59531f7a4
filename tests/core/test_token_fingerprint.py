"""Fingerprints of tokens: how much two prompts share, and nothing of what they say."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.cache.prefix_hashes import MAX_HASHES
from vllm_cachescope.diagnosis.token_fingerprint import fingerprint_tokens

SECRET = b"a secret of the tests"


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([1, 4, 16]))
def test_what_two_prompts_share_is_found(common: int, mine: int, yours: int, block: int) -> None:
    shared = list(range(common))
    one = fingerprint_tokens([*shared, *[7] * mine], block, SECRET)
    other = fingerprint_tokens([*shared, *[8] * yours], block, SECRET)
    step = max(one.step, other.step)
    assert one.shared_tokens(other) == other.shared_tokens(one) == common // step * step


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 600))
def test_what_is_too_little_may_be_found_to_be_nothing(common: int, more: int, least: int) -> None:
    one = fingerprint_tokens([*range(common), *[7] * more], 4, SECRET)
    other = fingerprint_tokens([*range(common), *[8] * more], 4, SECRET)
    shared = one.shared_tokens(other)
    assert one.shared_tokens(other, least) in ((shared,) if least <= shared else (shared, 0))


def test_a_long_prompt_is_cut_into_longer_pieces() -> None:
    tokens = random.Random(1).choices(range(150_000), k=100_000)
    long = fingerprint_tokens(tokens, 16, SECRET)
    assert len(long.hashes) <= 8 * MAX_HASHES and long.step == 256
    short = fingerprint_tokens(tokens[:5000], 16, SECRET)
    assert short.step == 16
    # To the last point that both have.
    assert long.shared_tokens(short) == 4864
    assert long.shared_tokens(long) == long.tokens == 99_840


def test_another_secret_or_another_block_shares_nothing() -> None:
    tokens = list(range(1000))
    assert (
        fingerprint_tokens(tokens, 16, SECRET).shared_tokens(fingerprint_tokens(tokens, 16, b"x"))
        == 0
    )
    assert (
        fingerprint_tokens(tokens, 16, SECRET).shared_tokens(fingerprint_tokens(tokens, 24, SECRET))
        == 0
    )


def test_a_prompt_shorter_than_a_block_has_no_points() -> None:
    short = fingerprint_tokens(list(range(15)), 16, SECRET)
    assert short.tokens == 0 and short.shared_tokens(short) == 0
