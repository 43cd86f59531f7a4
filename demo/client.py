"""Puts a prompt to a server through the real clients, and reads off what the cache did."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from demo.session import to_chat

MODEL = "demo"
"""The name the servers serve their model under."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        ttft_s: seconds until the first token of the answer was there.
        text: the answer.
        read: prompt tokens read from the cache.
        created: prompt tokens computed and put into the cache.
        uncached: prompt tokens neither read nor put.
    """

    ttft_s: float
    text: str
    read: int
    created: int
    uncached: int

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return self.read + self.created + self.uncached


class AnthropicClient:
    """One organisation's `anthropic` client.

    Args:
        url: the server.
        api_key: what the organisation is known by.
    """

    name = "anthropic"

    def __init__(self, url: str, api_key: str) -> None:
        self._client = anthropic.Anthropic(base_url=url, api_key=api_key, max_retries=0)

    def ask(self, body: dict[str, Any], session: str, max_tokens: int = 8) -> Answer:
        """Stream the answer to ``body``, a prompt of the Messages API."""
        ttft_s = None
        start = time.perf_counter()
        with self._client.messages.stream(
            model=MODEL,
            max_tokens=max_tokens,
            extra_body={"temperature": 0.0},
            extra_headers={"X-CacheScope-Session": session},
            **body,
        ) as stream:
            for event in stream:
                if ttft_s is None and event.type == "content_block_delta":
                    ttft_s = time.perf_counter() - start
            message = stream.get_final_message()
        assert ttft_s is not None, "the answer is empty"
        usage = message.usage
        return Answer(
            ttft_s,
            "".join(block.text for block in message.content if block.type == "text"),
            read=usage.cache_read_input_tokens or 0,
            created=usage.cache_creation_input_tokens or 0,
            uncached=usage.input_tokens,
        )


class OpenAIClient:
    """One organisation's `openai` client; takes the same prompts, as Chat Completions."""

    name = "openai"

    def __init__(self, url: str, api_key: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0)

    def ask(self, body: dict[str, Any], session: str, max_tokens: int = 8) -> Answer:
        """Stream the answer to ``body``, a prompt of the Messages API."""
        ttft_s = None
        text = ""
        usage = None
        start = time.perf_counter()
        for chunk in self._client.chat.completions.create(
            model=MODEL,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            prompt_cache_key=session,
            **to_chat(body),
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                ttft_s = ttft_s or time.perf_counter() - start
                text += chunk.choices[0].delta.content
            usage = chunk.usage or usage
        assert ttft_s is not None and usage is not None, "the answer is empty"
        details = usage.prompt_tokens_details
        read = details.cached_tokens or 0 if details else 0
        created = details.cache_write_tokens or 0 if details else 0
        return Answer(ttft_s, text, read, created, usage.prompt_tokens - read - created)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a server's /metrics says of the cache at one moment.

    Attributes:
        tokens: prompt tokens by (outcome, scope, TTL class).
        evictions: entries that left a tier, by (tier, reason).
        resident_bytes: bytes held, by (tier, TTL class).
    """

    tokens: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    evictions: Counter[tuple[str, str]] = field(default_factory=Counter)
    resident_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def total(self, outcome: str = "", scope: str = "") -> int:
        """Return the tokens whose outcome starts with ``outcome``, and of ``scope`` if given."""
        return sum(
            tokens
            for (an_outcome, a_scope, _), tokens in self.tokens.items()
            if an_outcome.startswith(outcome) and scope in ("", a_scope)
        )

    def since(self, earlier: "Metrics") -> "Metrics":
        """Return what was counted after ``earlier``; what is resident is as it is now."""
        return Metrics(
            self.tokens - earlier.tokens, self.evictions - earlier.evictions, self.resident_bytes
        )


def read_metrics(url: str) -> Metrics:
    """Read the /metrics of the server at ``url``."""
    metrics = Metrics()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            labels, value = sample.labels, int(sample.value)
            match sample.name:
                case "cachescope_prompt_tokens_total":
                    key = labels["outcome"], labels["scope"], labels["ttl"]
                    metrics.tokens[key] += value
                case "cachescope_evictions_total":
                    metrics.evictions[labels["tier"], labels["reason"]] += value
                case "cachescope_resident_bytes":
                    metrics.resident_bytes[labels["tier"], labels["ttl"]] += value
    return metrics


def empty_device_cache(url: str, timeout_s: float = 10.0, connector: bool = False) -> None:
    """Empty the server's prefix cache. Takes VLLM_SERVER_DEV_MODE=1.

    Args:
        url: the server.
        timeout_s: how long to try, in seconds.
        connector: whether to empty the memory of its KV connector, too: with CacheScope the CPU
            tier, but no remote tier.

    Raises:
        TimeoutError: if the engine still uses blocks after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = httpx.post(
            f"{url}/reset_prefix_cache", params={"reset_external": connector}, timeout=60
        ).raise_for_status()
        if answer.json()["success"]:
            return
        time.sleep(0.05)
    raise TimeoutError("the device cache could not be emptied: its blocks are in use")
