"""Where a prompt's prefix should have been read from, against a search without shortcuts."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt, prefix_source
from vllm_cachescope.diagnosis.token_fingerprint import fingerprint_tokens

BLOCK = 4
ENGINES = tuple(EngineId(rank, "epoch", "hashing") for rank in range(2))


def computed(parts: list[str], covered: int, readable: int, at: float, engine: int):
    """A prompt of parts of 8 tokens each, of which no two are alike."""
    tokens = [ord(letter) * 1000 + place for letter in parts for place in range(8)]
    return ComputedPrompt(
        tokens=fingerprint_tokens(tokens, BLOCK, b"a secret of the tests"),
        computed_tokens=min(covered, len(tokens)) // BLOCK * BLOCK,
        blocks=None,
        covered_tokens=len(tokens),
        readable_tokens=readable,
        ttl_s=300,
        engine=ENGINES[engine],
        began=at,
        computed_at=at + 1.5,
        used_at=at + 2.0,
    )


prompts = st.builds(
    computed,
    st.lists(st.sampled_from("ab"), max_size=6),
    st.integers(0, 50),
    st.integers(0, 50),
    st.floats(0, 9),
    st.integers(0, 1),
)


@given(prompts, st.lists(prompts, max_size=12))
def test_the_source_is_that_of_a_search_without_shortcuts(prompt, earlier) -> None:
    found = prefix_source(prompt, earlier)
    ranks = []
    for number, other in enumerate(earlier):
        shared = other.tokens.shared_tokens(prompt.tokens)
        left, _ = other.left_to(prompt, shared)
        ranks.append((left, other.engine == prompt.engine, shared, other.used_at, -number))
    if found is None:
        assert not earlier
        return
    assert found.prompt is earlier[-max(ranks)[-1]]
    assert found.left_tokens == max(ranks)[0]
    assert found.shared_tokens == max(rank[2] for rank in ranks)
    assert (found.unleft is None) == (found.left_tokens == found.shared_tokens)
