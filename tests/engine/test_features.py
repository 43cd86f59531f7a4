"""vLLM's features under the plugin: equal answers, no tenant's blocks for another, usage as vLLM
counts, and nothing unexplained."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.engine import BLOCK, draw_tokens
from tests.engine.lora import build_adapter
from tests.engine.server import MODEL, SMALL, Api, breaks, serve_scoped

pytestmark = pytest.mark.engine

BLOCKS = 5
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def api(tiny_model, tmp_path_factory) -> Iterator[Api]:
    """A server that speculates and keeps its KV in 8 bits."""
    options = [*SMALL, "--kv-cache-dtype", "fp8", "--speculative-config", json.dumps(NGRAM)]
    with serve_scoped(tiny_model, tmp_path_factory.mktemp("features"), *options) as api:
        yield api


def prompt(name: str) -> list[int]:
    """Return a prompt of `BLOCKS` blocks and some tokens."""
    return draw_tokens(random.Random(name), BLOCKS * BLOCK + 60)


def complete(api: Api, key: str, tokens: list[int], **fields: Any) -> tuple[list[str], int]:
    """Ask for a completion; return its texts, and the tokens that it read by its usage."""
    body = {"model": MODEL, "prompt": tokens, "temperature": 0, "max_tokens": 12} | fields
    answer = api.post("/v1/completions", body, key)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == len(tokens)
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] + details["cache_write_tokens"] <= len(tokens)
    return [choice["text"] for choice in answer.json()["choices"]], details["cached_tokens"]


def unexplained(api: Api) -> int:
    return sum(api.metrics("cachescope_unexplained_tokens_total").values())


def assert_sound(api: Api, name: str, read_by_vllm: bool = True, **fields: Any) -> None:
    """Ask three times, the last time as another tenant."""
    tokens = prompt(name)
    counts = "vllm:prefix_cache_hits_total"
    cold, none = complete(api, f"one of {name}", tokens, **fields)
    before = sum(api.metrics(counts).values())
    warm, read = complete(api, f"one of {name}", tokens, **fields)
    others, others_read = complete(api, f"other of {name}", tokens, **fields)
    assert cold == warm == others
    assert (none, read, others_read) == (0, BLOCKS * BLOCK, 0)
    if read_by_vllm:
        assert sum(api.metrics(counts).values()) - before == read
    assert unexplained(api) == 0


def test_speculation_and_kv_of_8_bits(api: Api) -> None:
    assert_sound(api, "plain")
    assert sum(api.metrics("vllm:spec_decode_num_drafts_total").values()) > 0


@pytest.mark.parametrize("fields", [{}, {"stream": False, "best_of": 3}], ids=["", "best of"])
def test_a_beam_search_reads_one_prompt(api: Api, fields: dict[str, Any]) -> None:
    name = f"beams {len(fields)}"
    assert_sound(api, name, read_by_vllm=False, use_beam_search=True, n=3)
    told = api.metrics("cachescope_prompt_tokens_total")
    assert sum(told.values()) % len(prompt(name)) == 0


@pytest.mark.slow
def test_two_workers_with_half_of_the_heads_each(tiny_model, tmp_path) -> None:
    options = ["--max-model-len", "4096", "--num-gpu-blocks-override", "40"]
    with serve_scoped(tiny_model, tmp_path, *options, "--tensor-parallel-size", "2") as api:
        assert_sound(api, "two workers")
        api.empty_device()
        read = complete(api, "one of two workers", prompt("two workers"))[1]
        assert read == BLOCKS * BLOCK


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return build_adapter(tmp_path_factory.mktemp("adapter"), seed=1)


@pytest.fixture(scope="module")
def lora_api(tiny_model, adapter, tmp_path_factory) -> Iterator[Api]:
    """A server with an adapter."""
    options = [*SMALL, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"own={adapter}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with serve_scoped(tiny_model, tmp_path_factory.mktemp("lora"), *options) as api:
            yield api


def test_several_samples_read_one_prompt(lora_api: Api) -> None:
    # Each further sample is a request of vLLM's own, and reads what the first has computed.
    # vLLM takes no more than one sample for greedy; of one candidate any sample is the greedy one.
    # Where it speculates, its CPU build cannot sample.
    assert_sound(lora_api, "samples", read_by_vllm=False, n=3, temperature=1, top_k=1)


def test_an_adapter_that_is_replaced_in_a_running_server(lora_api: Api, adapter: Path) -> None:
    assert_sound(lora_api, "base")
    assert_sound(lora_api, "adapter", model="own")
    old, _ = complete(lora_api, "one of adapter", prompt("adapter"), model="own")
    base, read = complete(lora_api, "one of adapter", prompt("adapter"))
    assert old != base and read == 0

    build_adapter(adapter, seed=2)
    load = {"lora_name": "own", "lora_path": str(adapter), "load_inplace": True}
    httpx.post(f"{lora_api.url}/v1/load_lora_adapter", json=load, timeout=60).raise_for_status()
    known = len(breaks(lora_api, "one of adapter"))
    new, read = complete(lora_api, "one of adapter", prompt("adapter"), model="own")
    others, _ = complete(lora_api, "another of adapter", prompt("adapter"), model="own")
    again, read_again = complete(lora_api, "one of adapter", prompt("adapter"), model="own")
    assert new == again == others != old
    assert (read, read_again) == (0, BLOCKS * BLOCK)
    assert unexplained(lora_api) == 0
    seen, *_ = found = breaks(lora_api, "one of adapter")
    assert len(found) == known + 1 and seen["cause"] == "hash_settings_differ"
    assert seen["engine"][0]["detail"] == "the LoRA adapter was replaced"
