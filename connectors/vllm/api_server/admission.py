"""The admission of prompts: the one place between the API server and the engine client.

Each prompt gets its plan here. The engine's report is taken off the outputs that come back, so that
no response shows it.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from vllm.sampling_params import RequestOutputKind

from vllm_cachescope.api.request_context import PromptTiming, RequestContext, current_request
from vllm_cachescope.cache.report import Report, estimate
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import engine_rpc
from vllm_cachescope.connectors.vllm.api_server import media_ids
from vllm_cachescope.connectors.vllm.api_server.planning import Planner
from vllm_cachescope.connectors.vllm.api_server.tracing import Tracer
from vllm_cachescope.connectors.vllm.plan_transport import (
    take_report,
    with_plan,
    without_plan,
    without_plan_in,
)
from vllm_cachescope.diagnosis.answer_lines import TAIL_CHARACTERS
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.tenancy.scope import Caller, Scope

logger = logger_of(__name__)


class Admission:
    """Stands in front of the engine client's `generate` and `encode`, and of what it tells the
    engine of requests that never got there.

    Args:
        state: the API server's state.
        config: the configuration.
        secret: key of the scope keys and of the plans' MACs.
        directory: the organisations, and what they may share.
        tracer: holds vLLM's spans back; None where vLLM traces nothing.
    """

    def __init__(
        self,
        state: Any,
        config: Config,
        secret: bytes,
        directory: CallerDirectory,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._engine = state.engine_client
        self._secret = secret
        self._planner = Planner(state, config, secret, directory)
        media_ids.confine(self._engine.renderer, secret)
        self._block_size: int = self._engine.vllm_config.cache_config.block_size
        self._generate = self._engine.generate
        self._tells_session = "session_id" in inspect.signature(self._generate).parameters
        self._engine.generate = self.generate
        self._encode = self._engine.encode
        self._engine.encode = self.encode
        self._reject = getattr(self._engine, "notify_kv_transfer_request_rejected", None)
        if self._reject is not None:
            self._engine.notify_kv_transfer_request_rejected = self.reject

    def purge_renderings(self, org: str | None, session: str | None) -> None:
        """Drop what is kept of rendered prompts of ``org``, or of one session of ``org``; with
        None, of everyone."""
        self._planner.purge_renderings(org, session)

    async def renders_tools_behind_system(self) -> bool | None:
        """Return whether the chat template renders tools behind the system prompt; None if that
        cannot be told."""
        return await self._planner.renders_tools_behind_system()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Do what the engine client's `generate` does, for a prompt with a plan."""
        context = current_request.get()
        with _running(context):
            plan = unreported = None
            if context is not None:
                try:
                    plan = await self._plan(context, prompt, options.get("session_id"))
                except BaseException:
                    # The client has disconnected, as a rule.
                    media_ids.forget_unsent(self._engine.renderer, prompt)
                    raise
                if plan is None:
                    unreported = self._plan_whole(context.caller, prompt)
            if (known := plan or unreported) is not None:
                sampling_params = with_plan(sampling_params, known, self._secret)
            else:
                sampling_params = without_plan(sampling_params)
            reported = False
            if self._tracer is not None and context is not None and plan is not None:
                headers = options.get("trace_headers")
                self._tracer.begin(context, request_id, plan.nonce, headers)
            if self._tells_session and context is not None:
                # So that KV events, and routers by them, know sessions that vLLM does not.
                options["session_id"] = options.get("session_id") or context.caller.session
            counts, tail = OutputCount(sampling_params), AnswerTail(sampling_params)
            outputs = self._generate(prompt, sampling_params, request_id, **options)
            try:
                async for output in outputs:
                    data = take_report(output)
                    if context is not None and unreported is not None and data is not None:
                        context.untold[unreported.nonce] = Report.from_wire(data)
                        reported = True
                    if context is not None and plan is not None:
                        timing = context.timings[plan.nonce]
                        timing.output_tokens += counts.new(output)
                        if context.caller.session is not None:
                            context.answers[plan.nonce] = tail.with_text_of(output)
                        timing.computed_at = timing.computed_at or time.monotonic()
                        if data is not None:
                            context.reports[plan.nonce] = Report.from_wire(data)
                            reported = True
                        elif plan.nonce not in context.reports:
                            context.reports[plan.nonce] = estimate(
                                plan, self._block_size, output.num_cached_tokens or 0
                            )
                        if output.finished and not reported:
                            # The API's side ends a request at a stop string. The engine's last
                            # output then goes nowhere, and its report has to be fetched.
                            await self._fetch_report(context.reports, plan)
                            reported = True
                    yield output
            finally:
                await outputs.aclose()
                if self._tracer is not None:
                    self._tracer.end(request_id)
                if context is not None and plan is not None and not reported:
                    timing = context.timings[plan.nonce]
                    timing.computed_at = timing.computed_at or time.monotonic()
                    # Not awaited: the client has disconnected, and its task is cancelled.
                    self._fetch_later(context, context.reports, plan)
                if context is not None and unreported is not None and not reported:
                    self._fetch_untold(context, unreported)

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Do what the engine client's `encode` does, for a prompt with a plan. There is no usage
        to tell the client of, and no output brings the report."""
        context = current_request.get()
        with _running(context):
            plan = None if context is None else self._plan_whole(context.caller, prompt)
            if plan is not None:
                pooling_params = with_plan(pooling_params, plan, self._secret)
            else:
                pooling_params = without_plan(pooling_params)
            outputs: AsyncGenerator[Any, None] = self._encode(
                prompt, pooling_params, request_id, **options
            )
            try:
                async for output in outputs:
                    yield output
            finally:
                await outputs.aclose()
                if context is not None and plan is not None:
                    self._fetch_untold(context, plan)

    async def reject(
        self, request_id: str, kv_transfer_params: dict[str, Any], **options: Any
    ) -> None:
        """Do what the engine client's `notify_kv_transfer_request_rejected` does, for what a client
        has sent beside a prompt that the server refused."""
        assert self._reject is not None
        await self._reject(request_id, without_plan_in(kv_transfer_params), **options)

    async def _plan(
        self, context: RequestContext, prompt: Any, session_id: str | None
    ) -> Plan | None:
        """Return the plan of a prompt whose report the client is told of; None for a prompt without
        tokens, as embeddings are."""
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if not tokens:
            return None
        if (begun := _begun(context, tokens)) is not None:
            return begun
        caller = context.caller
        if session_id is not None:
            caller = replace(caller, session=session_id)
        with context.stage("plan"):
            plan = await self._planner.plan(context, caller, tokens, prompt.get("prompt"))
        readable = plan.spans if caller.session is not None else _shared_spans(plan)
        context.timings[plan.nonce] = PromptTiming(
            tokens,
            plan.covered_tokens,
            max((span.end for span in readable), default=0),
            time.monotonic(),
        )
        context.plans[plan.nonce] = plan
        return plan

    def _plan_whole(self, caller: Caller, prompt: Any) -> Plan | None:
        """Return a plan that caches a prompt as a whole; None if its length cannot be told."""
        tokens = _length(prompt)
        return self._planner.plan_whole(caller, tokens) if tokens else None

    def _fetch_untold(self, context: RequestContext, plan: Plan) -> None:
        """Fetch a report that only the request's record needs."""
        if context.is_recorded:
            self._fetch_later(context, context.untold, plan)

    def _fetch_later(self, context: RequestContext, reports: dict[str, Report], plan: Plan) -> None:
        before = context.fetching

        async def fetch() -> None:
            if before is not None:
                await before
            await self._fetch_report(reports, plan)

        context.fetching = asyncio.get_running_loop().create_task(fetch())

    async def _fetch_report(self, reports: dict[str, Report], plan: Plan) -> None:
        try:
            answers = await engine_rpc.call(self._engine, "report", plan.nonce)
        except Exception:
            logger.warning("The engine's report could not be fetched", exc_info=True)
            return
        for data in answers:
            if data is not None:
                reports[plan.nonce] = Report.from_wire(data)


def _running(context: RequestContext | None) -> AbstractContextManager[None]:
    return nullcontext() if context is None else context.running()


class OutputCount:
    """The count of the tokens that one call of the engine client's `generate` returns.

    Args:
        sampling_params: the call's parameters, which say whether outputs repeat earlier tokens.
    """

    def __init__(self, sampling_params: Any) -> None:
        self._repeats = sampling_params.output_kind is RequestOutputKind.CUMULATIVE
        self._counted: dict[int, int] = {}

    def new(self, output: Any) -> int:
        """Return how many tokens ``output`` has that no output before had."""
        new = 0
        for sample in output.outputs:
            tokens = len(sample.token_ids)
            if self._repeats:
                before, self._counted[sample.index] = self._counted.get(sample.index, 0), tokens
                tokens -= before
            new += tokens
        return new


class AnswerTail:
    """The end of the text that one call of the engine client's `generate` returns, of its first
    sample.

    Args:
        sampling_params: the call's parameters, which say whether outputs repeat earlier text.
    """

    def __init__(self, sampling_params: Any) -> None:
        self._repeats = sampling_params.output_kind is RequestOutputKind.CUMULATIVE
        self._text = ""

    def with_text_of(self, output: Any) -> str:
        """Return the end of the text, with that of ``output``."""
        for sample in output.outputs:
            if sample.index == 0:
                text = sample.text if self._repeats else self._text + sample.text
                # One more, so that it shows where the beginning is cut off.
                self._text = text[-TAIL_CHARACTERS - 1 :]
        return self._text


def _begun(context: RequestContext, tokens: list[int]) -> Plan | None:
    """Return the plan of the prompt that a beam search began with, if ``tokens`` are that prompt
    and a beam; None otherwise. Each step of a beam search comes as a prompt of its own, and the
    client has sent, and is told of, one."""
    if not context.body.get("use_beam_search"):
        return None
    begun = [
        (len(timing.tokens), nonce)
        for nonce, timing in context.timings.items()
        if len(timing.tokens) < len(tokens) and tokens[: len(timing.tokens)] == timing.tokens
    ]
    return context.plans[max(begun)[1]] if begun else None


def _shared_spans(plan: Plan) -> tuple[Span, ...]:
    """Return the spans that a caller without a session shares with others."""
    return tuple(span for span in plan.spans if span.scope is not Scope.SESSION)


def _length(prompt: Any) -> int:
    """Return how many positions a prompt has in the cache, whatever its kind; 0 if that is not
    known. Of an encoder-decoder's prompt the decoder's part is cached."""
    if not isinstance(prompt, dict):
        return 0
    prompt = prompt.get("decoder_prompt", prompt)
    tokens = prompt.get("prompt_token_ids")
    return len(prompt.get("prompt_embeds", ()) if tokens is None else tokens)
