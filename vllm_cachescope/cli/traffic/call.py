"""A recorded call: what of a request matters to its prompt cache, whichever log it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.prompt.request import PromptRequest

BLOCK_TOKENS = 512
"""Tokens per hash id in Mooncake's traces."""


class TrafficError(ValueError):
    """A line that is none of the known formats, or a request the server would have refused; a file
    without any."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a response said of its prompt's tokens.

    Attributes:
        prompt_tokens: length of the whole prompt, in tokens.
        read_tokens: how many of them were read from the cache.
        created_tokens: how many were written to it; None if that is not told.
    """

    prompt_tokens: int
    read_tokens: int
    created_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded request.

    Attributes:
        source: file and line, as in ``logs/traffic.jsonl:12``; of several calls in one line or one
            document, also which one: ``traffic.har:1#12``.
        at: when the call was made, in Unix seconds; None if not recorded, or not a possible time.
        session: the session it belongs to; None if it names none.
        request: the prompt and its breakpoints.
        extra: what else in body and headers to compare; see `extra_fields`.
        text: the whole prompt, in a text trace; otherwise None.
        output: what was generated, in a text trace; None if not recorded.
        response_id: the id of its response; None if not recorded.
        usage: what its response said of the cache; None if not recorded.
        body: its body as it was sent; None if that was not recorded.
        ended: how its answer ended; None if not recorded, or cut off.
        session_over: whether it says that its session is over.
    """

    source: str
    at: float | None
    session: str | None
    request: PromptRequest
    extra: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    output: str | None = None
    response_id: str | None = None
    usage: Usage | None = None
    body: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    ended: Ended | None = None
    session_over: bool = False


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A call of a block trace.

    Attributes:
        source: file and line, as in ``logs/trace.jsonl:12``.
        at: when the call was made, in seconds since the start of the trace.
        tokens: length of the prompt, in tokens.
        blocks: a hash id for each block of `BLOCK_TOKENS` tokens; the last block may be partial.
        output_tokens: how many tokens were generated; None if not recorded.
    """

    source: str
    at: float
    tokens: int
    blocks: tuple[int, ...]
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A line that was left out, since it could not be understood or its server refused it.

    Attributes:
        source: file and line.
        reason: why.
        refused: whether it is a request that the server refuses for its cache markers.
    """

    source: str
    reason: str
    refused: bool = False

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.source}: {self.reason}"
