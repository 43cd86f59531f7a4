import json
import statistics
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.session import agent_session
from vllm_cachescope.cli.token_counter import SCALE, load_counter, shipped_tokenizer
from vllm_cachescope.diagnosis.canonical import canonical_content

COUNT = load_counter()
SHIPPED = shipped_tokenizer()


@given(st.text(max_size=300))
def test_words_add_up_to_what_the_library_counts(text: str) -> None:
    tokens = len(SHIPPED.encode(text.encode("utf-8", "replace").decode()).ids)
    assert COUNT(text, b"") == round(tokens * SCALE) or (text and COUNT(text, b"") == 1)


def test_counts_are_near_those_of_a_large_models_tokenizer() -> None:
    # Tekken comes with vLLM; its vocabulary is as large as that of large models.
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    data = resources.files("mistral_common") / "data" / "tekken_240911.json"
    with resources.as_file(data) as path:
        real = tekken.Tekkenizer.from_file(str(path))
    errors = []
    for seed in range(4):
        text = json.dumps(agent_session(seed, 6, 8).body(5))
        errors.append(COUNT(text, b"") / len(real.encode(text, bos=False, eos=False)) - 1)
    assert statistics.mean(map(abs, errors)) < 0.15


def test_the_file_is_small() -> None:
    packed = (resources.files("vllm_cachescope.cli") / "tokenizer.json.gz").read_bytes()
    assert len(packed) < 1_000_000


@pytest.mark.parametrize(
    "content",
    [
        {"type": "text", "text": "four words of text", "citations": []},
        {"type": "tool_result", "tool_use_id": "a", "content": "four words of text"},
        {
            "type": "tool_result",
            "tool_use_id": "a",
            "content": [{"type": "text", "text": "four words of text"}],
        },
        {"type": "function_call_output", "call_id": "a", "output": "four words of text"},
    ],
)
def test_only_what_is_rendered_counts(content: object) -> None:
    data = canonical_content(content).data
    assert COUNT(content, data) == COUNT("four words of text", b"")


def test_an_image_is_not_text() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "iVBOR" * 100_000}
    image = {"type": "image", "source": source}
    for content in (image, {"type": "tool_result", "tool_use_id": "a", "content": [image]}):
        assert COUNT(content, canonical_content(content).data) < 2000


def test_half_a_surrogate_pair_is_counted() -> None:
    assert COUNT("\ud800 and text", b"") >= 2
