"""The usage of a request: tokens read from the cache and put into it, in the protocols' fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHORT_S = 300
_HALF_HOUR_S = 1800


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a request's prompts, by where they came from. All counts are tokens.

    Attributes:
        prompt_tokens: all tokens of the prompts.
        read: tokens read from the cache, from whatever tier.
        created_by_ttl: tokens computed and put into the cache, by lifetime in seconds.
        read_by_tier: what was read, by the name of the tier; None if the client did not ask for it.

    Raises:
        ValueError: if a count is negative, or their sum is more than the prompt.
    """

    prompt_tokens: int
    read: int
    created_by_ttl: Mapping[int, int]
    read_by_tier: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if min(self.read, self.uncached, *self.created_by_ttl.values()) < 0:
            raise ValueError(f"the counts do not add up to the prompt: {self}")

    @property
    def created(self) -> int:
        """Tokens computed and put into the cache."""
        return sum(self.created_by_ttl.values())

    @property
    def uncached(self) -> int:
        """Tokens neither read from the cache nor put into it."""
        return self.prompt_tokens - self.read - self.created

    @property
    def details(self) -> dict[str, Any]:
        """The tokens read by tier, as a field of a usage; empty if nobody asked for it."""
        by_tier = self.read_by_tier
        return {} if by_tier is None else {"cached_tokens_details": dict(by_tier)}

    def created_within(self, ttl_s: int) -> int:
        """Tokens put into the cache for at most ``ttl_s`` seconds."""
        return sum(tokens for ttl, tokens in self.created_by_ttl.items() if ttl <= ttl_s)


def write_messages(usage: dict[str, Any], counts: Usage) -> None:
    """Write ``counts`` into the ``usage`` of a Messages response.

    Its ``input_tokens`` are those neither read nor created; the three counts add up to the
    prompt. Anthropic has two lifetimes: what is kept for 5 minutes or less is reported as 5m,
    what is kept longer as 1h.
    """
    short = counts.created_within(_SHORT_S)
    usage["input_tokens"] = counts.uncached
    usage["cache_read_input_tokens"] = counts.read
    usage["cache_creation_input_tokens"] = counts.created
    usage["cache_creation"] = {
        "ephemeral_5m_input_tokens": short,
        "ephemeral_1h_input_tokens": counts.created - short,
    }
    usage |= counts.details


def write_chat(usage: dict[str, Any], counts: Usage) -> None:
    """Write ``counts`` into the ``usage`` of a Chat Completions or Completions response."""
    details = usage.get("prompt_tokens_details")
    usage["prompt_tokens_details"] = {
        **(details if isinstance(details, dict) else {}),
        "cached_tokens": counts.read,
        **counts.details,
        "cache_write_tokens": counts.created,
    }


def write_responses(usage: dict[str, Any], counts: Usage) -> None:
    """Write ``counts`` into the ``usage`` of a Responses response.

    OpenAI has two lifetimes: what is kept for 30 minutes or less is reported as 30m, what is
    kept longer as 12h.
    """
    short = counts.created_within(_HALF_HOUR_S)
    details = usage.get("input_tokens_details")
    usage["input_tokens_details"] = {
        **(details if isinstance(details, dict) else {}),
        "cached_tokens": counts.read,
        **counts.details,
        "cache_write_tokens": counts.created,
        "cache_write_tokens_details": {
            "ttl_30m_tokens": short,
            "ttl_12h_tokens": counts.created - short,
        },
    }
