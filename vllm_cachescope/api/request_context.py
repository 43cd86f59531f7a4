"""The context of one HTTP request on its way through the API process."""

import time
from asyncio import Task
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cache.report import Report
from vllm_cachescope.metrics import NO_ENGINE
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.tenancy.scope import Caller


@dataclass(slots=True)
class PromptTiming:
    """One prompt, and when the engine had it and had computed it.

    Attributes:
        tokens: the prompt's token ids.
        covered_tokens: leading tokens that a breakpoint covers.
        readable_tokens: leading tokens that later requests of the session may read.
        began: when the engine was given the prompt, in seconds of `time.monotonic`.
        computed_at: when the engine returned its first token, or was told to cut the prompt off, on
            the same clock; None before.
        output_tokens: tokens that the engine has returned so far, over all samples.
    """

    tokens: Sequence[int]
    covered_tokens: int
    readable_tokens: int
    began: float
    computed_at: float | None = None
    output_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first token came; None if none has."""
        if self.computed_at is None or not self.output_tokens:
            return None
        return self.computed_at - self.began


@dataclass(slots=True)
class RequestContext:
    """One request, as the middleware and the adapter to the engine share it.

    Attributes:
        caller: on whose behalf the request runs.
        request: the request as the cache sees it; None on a path whose body is not read: its
            prompt is cached as a whole.
        body: the body as the server sees it, without cache markers.
        wants_tiers: whether the client wants to be told what was read from which tier.
        rendering: the task in which the adapter renders the beginnings of the prompt; None before
            it is started.
        reports: the engine's report on each of the request's prompts, by the prompt's nonce. The
            first token brings an estimate, the last one the engine's own count.
        untold: the engine's report on each of the request's prompts whose usage the client is not
            told, by nonce: those to pool, and those without token ids.
        timings: each of the request's prompts with its times, by the same nonce.
        answers: the end of the text that each of the request's prompts was answered with, by the
            same nonce.
        plans: the plan of each of the request's prompts, by the same nonce.
        fetching: the task that fetches the reports that no output brings, as those of a request
            whose client has disconnected; None if there is none.
        is_recorded: whether somebody keeps the request's record, and wants every report.
        stages: seconds that caching itself has taken of the request, by stage; see `stage`.
        known_tokens: tokens of its prompts that were known, and not tokenised.
        new_tokens: tokens of its prompts that were tokenised.
        traces: the adapter's own notes for the traces of the request's prompts, by nonce.
        recorded: nonces of the prompts that a record has.
        ends_session: whether the client says that its session is over with this request.
        under_way: how many of the request's prompts the engine has, or is about to be given. The
            server may be done with the request before: it does not wait for what it has cut off,
            and a response may be computed in the background.
        on_over: called whenever the server is done with the request and no prompt is under way;
            None while the server is not done.
    """

    caller: Caller
    request: PromptRequest | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    wants_tiers: bool = False
    rendering: Task[Any] | None = None
    reports: dict[str, Report] = field(default_factory=dict)
    untold: dict[str, Report] = field(default_factory=dict)
    timings: dict[str, PromptTiming] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    fetching: Task[None] | None = None
    is_recorded: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    known_tokens: int = 0
    new_tokens: int = 0
    traces: dict[str, Any] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    ends_session: bool = False
    under_way: int = 0
    on_over: Callable[[], None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside as a part of the stage ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    @property
    def engine(self) -> str:
        """Rank of the engine that ran the request, its first prompt if it had several, as metrics
        have it; `NO_ENGINE` if no engine has told of it."""
        for report in (*self.reports.values(), *self.untold.values()):
            if report.engine is not None:
                return str(report.engine.rank)
        return NO_ENGINE

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note that a prompt is under way for as long as this lasts."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._call_if_over()

    def end(self, on_over: Callable[[], None]) -> None:
        """Note that the server is done with the request; ``on_over`` is called, now and perhaps
        later, when no prompt is under way."""
        self.on_over = on_over
        self._call_if_over()

    def _call_if_over(self) -> None:
        if self.on_over is not None and not self.under_way:
            self.on_over()


current_request: ContextVar[RequestContext | None] = ContextVar("cachescope_request", default=None)
"""The context of the request that the running code works for; None outside of a request."""
