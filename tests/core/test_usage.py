from typing import Any

import pytest
from anthropic.types import Usage as AnthropicUsage
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CompletionUsage
from openai.types.responses import ResponseUsage

from vllm_cachescope.api.usage import Usage, write_chat, write_messages, write_responses

COUNTS = Usage(1000, read=600, created_by_ttl={60: 10, 300: 20, 1800: 40, 3600: 80, 86400: 160})


def test_counts_add_up() -> None:
    assert (COUNTS.created, COUNTS.uncached) == (310, 90)


@pytest.mark.parametrize(
    ("read", "created"), [(-1, {}), (0, {300: -1}), (11, {}), (6, {300: 3, 60: 2})]
)
def test_counts_that_do_not_add_up(read: int, created: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="add up"):
        Usage(10, read, created)


def test_messages() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 7, "service_tier": "standard"}
    write_messages(usage, COUNTS)
    assert usage == {
        "input_tokens": 90,
        "cache_read_input_tokens": 600,
        "cache_creation_input_tokens": 310,
        "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 280},
        "output_tokens": 7,
        "service_tier": "standard",
    }
    parsed = AnthropicUsage.model_validate(usage, strict=True)
    assert parsed.cache_creation is not None
    assert parsed.cache_creation.ephemeral_1h_input_tokens == 280


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}])
def test_chat(details: dict[str, Any]) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 7, "total_tokens": 1007, **details}
    write_chat(usage, COUNTS)
    assert usage == {
        "prompt_tokens": 1000,
        "completion_tokens": 7,
        "total_tokens": 1007,
        "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 310},
    }
    parsed = CompletionUsage.model_validate(usage, strict=True)
    assert parsed.prompt_tokens_details is not None
    assert parsed.prompt_tokens_details.cache_write_tokens == 310


def test_chat_keeps_other_details() -> None:
    details = {"audio_tokens": 3, "cached_tokens": 1}
    usage = {"prompt_tokens_details": details}
    write_chat(usage, COUNTS)
    assert usage["prompt_tokens_details"]["audio_tokens"] == 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 600
    assert details == {"audio_tokens": 3, "cached_tokens": 1}


def test_responses() -> None:
    usage = {
        "input_tokens": 1000,
        "input_tokens_details": {"cached_tokens": 0, "input_tokens_per_turn": []},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 1007,
    }
    write_responses(usage, COUNTS)
    assert usage["input_tokens_details"] == {
        "cached_tokens": 600,
        "cache_write_tokens": 310,
        "cache_write_tokens_details": {"ttl_30m_tokens": 70, "ttl_12h_tokens": 240},
        "input_tokens_per_turn": [],
    }
    assert ResponseUsage.model_validate(usage, strict=True).input_tokens == 1000


@given(
    st.integers(0, 9), st.integers(0, 9), st.dictionaries(st.integers(1, 10**5), st.integers(0, 9))
)
def test_every_token_is_counted_once(read: int, uncached: int, created: dict[int, int]) -> None:
    counts = Usage(read + uncached + sum(created.values()), read, created)
    usage: dict[str, Any] = {}
    write_messages(usage, counts)
    by_ttl = usage["cache_creation"].values()
    assert sum(by_ttl) == usage["cache_creation_input_tokens"]
    assert (
        usage["input_tokens"]
        + usage["cache_read_input_tokens"]
        + usage["cache_creation_input_tokens"]
        == counts.prompt_tokens
    )
    write_responses(usage, counts)
    details = usage["input_tokens_details"]
    assert sum(details["cache_write_tokens_details"].values()) == details["cache_write_tokens"]
