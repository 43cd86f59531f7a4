"""One HTTP request on its way through the API process."""

from asyncio import Task
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cache.report import Report
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.tenancy.scope import Caller


@dataclass(slots=True)
class PromptTiming:
    """One prompt's passage through the engine.

    Attributes:
        tokens: the prompt.
        covered_tokens: leading tokens that a breakpoint covers.
        readable_tokens: leading tokens that later requests of the session may read.
        began: when the engine was given it, in seconds of `time.monotonic`.
        computed_at: when its first token was there; None before.
    """

    tokens: Sequence[int]
    covered_tokens: int
    readable_tokens: int
    began: float
    computed_at: float | None = None


@dataclass(slots=True)
class RequestContext:
    """What the middleware and the engine's side tell each other about a request.

    Attributes:
        caller: on whose behalf it runs.
        request: the request as the cache sees it; None on a path whose body is not read, which
            is cached as one unmarked prompt.
        body: the body as the server sees it, without cache markers.
        cuts: the task that renders its parts; None before it is started. What it returns is the
            engine's side's own.
        reports: what became of each of its prompts, by the prompt's nonce. The engine's side
            puts in an estimate as soon as the first token is there and the truth when it knows.
        passages: how each of its prompts passed through the engine, by the same nonce.
        fetching: the task that fetches the reports of a request that the client gave up; None
            if there is none.
    """

    caller: Caller
    request: PromptRequest | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    cuts: Task[Any] | None = None
    reports: dict[str, Report] = field(default_factory=dict)
    passages: dict[str, PromptTiming] = field(default_factory=dict)
    fetching: Task[None] | None = None


current_request: ContextVar[RequestContext | None] = ContextVar("cachescope_exchange", default=None)
"""The exchange that the running code works for; None outside one."""
