"""The one place every prompt passes on its way from the API to the engine, and back.

On the way in a prompt gets its plan; on the way out the engine's report is taken off, so that no
response shows it.
"""

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from vllm_cachescope.api.request_context import PromptTiming, RequestContext, current_request
from vllm_cachescope.cache.report import Outcome, Report, attribute_tokens
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import engine_rpc
from vllm_cachescope.connectors.vllm.api_server.rendering import Boundaries, Cut
from vllm_cachescope.connectors.vllm.engine.hashing import PLAN_KEY
from vllm_cachescope.prompt.plan import Plan, Span, seal
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.prompt.segments import RegionDefault, Segment, segments
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

logger = logging.getLogger(__name__)


class Admission:
    """Stands in front of the engine client's `generate`.

    Args:
        state: the API server's state.
        config: the configuration.
        secret: key of the scope keys and of the plans' MACs.
    """

    def __init__(self, state: Any, config: Config, secret: bytes) -> None:
        self._engine = state.engine_client
        self._secret = secret
        self._keys = ScopeKeys(secret)
        self._owners = OwnerTags(secret)
        self._boundaries = Boundaries(state, self._start_rendering)
        self._defaults = {
            region: RegionDefault(config.regions.of(region).scope, config.regions.of(region).ttl)
            for region in Region
        }
        self._block_size: int = self._engine.vllm_config.cache_config.block_size
        self._generate = self._engine.generate
        self._engine.generate = self.generate

    def forget(self) -> None:
        """Forget what is kept of prompts that were planned."""
        self._boundaries.forget()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Do what the engine client's `generate` does, for a prompt with a plan."""
        exchange = current_request.get()
        plan = None
        if exchange is not None:
            plan = await self._plan(exchange, prompt, options.get("session_id"))
        sampling_params = self._with_plan(sampling_params, plan)
        reported = False
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        try:
            async for output in outputs:
                data = _take_report(output)
                if exchange is not None and plan is not None:
                    passage = exchange.passages[plan.nonce]
                    passage.computed_at = passage.computed_at or time.monotonic()
                    if data is not None:
                        exchange.reports[plan.nonce] = Report.from_wire(data)
                        reported = True
                    elif plan.nonce not in exchange.reports:
                        exchange.reports[plan.nonce] = self._estimate(plan, output)
                    if output.finished and not reported:
                        # A stop string ends a request on the API's side; the engine's last word
                        # on it goes nowhere and has to be fetched.
                        await self._fetch_report(exchange, plan)
                        reported = True
                yield output
        finally:
            await outputs.aclose()
            if exchange is not None and plan is not None and not reported:
                # Not awaited: the client has gone, and its task with it.
                self._fetch_later(exchange, plan)

    async def _plan(
        self, exchange: RequestContext, prompt: Any, session_id: str | None
    ) -> Plan | None:
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if not tokens:
            return None
        if exchange.request is None:
            default = self._defaults[Region.MESSAGES]
            planned: tuple[Segment, ...] = (Segment(None, default.scope, default.ttl_s, True),)
            ends = [len(tokens)]
        else:
            self._start_rendering()
            assert exchange.cuts is not None
            planned, cuts = await exchange.cuts
            ends = await self._boundaries.ends(
                cuts, exchange.request.protocol, tokens, prompt.get("prompt")
            )
        caller = exchange.caller
        if session_id is not None:
            caller = replace(caller, session=session_id)
        plan = self._spans(planned, ends, caller)
        readable = plan.spans if caller.session is not None else _shared_spans(plan)
        exchange.passages[plan.nonce] = PromptTiming(
            tokens,
            plan.covered_tokens,
            max((span.end for span in readable), default=0),
            time.monotonic(),
        )
        return plan

    def _start_rendering(self) -> None:
        """The server tokenises a prompt, in another thread: render its parts meanwhile in this."""
        exchange = current_request.get()
        if exchange is not None and exchange.request is not None and exchange.cuts is None:
            cutting = self._cut(exchange.request, exchange.body)
            exchange.cuts = asyncio.get_running_loop().create_task(cutting)

    async def _cut(
        self, request: PromptRequest, body: Mapping[str, Any]
    ) -> tuple[tuple[Segment, ...], list[Cut | None]]:
        planned = segments(request, self._defaults)
        return planned, await self._boundaries.cuts(request, body, planned)

    def _spans(self, planned: tuple[Segment, ...], ends: list[int], caller: Caller) -> Plan:
        nonce = secrets.token_hex(8)
        spans: list[Span] = []
        for segment, end in zip(planned, ends, strict=True):
            if spans and end == spans[-1].end:
                continue
            unreadable = segment.scope is Scope.SESSION and caller.session is None
            spans.append(
                Span(
                    end,
                    segment.scope,
                    self._keys.key(segment.scope, caller, nonce),
                    segment.ttl_s,
                    # What nobody can read again is not worth keeping.
                    segment.covered and not unreadable,
                )
            )
        return Plan(tuple(span for span in spans if span.end > 0), nonce, self._owners.of(caller))

    def _with_plan(self, sampling_params: Any, plan: Plan | None) -> Any:
        """Return a copy with ``plan`` in it, or, without one, with nothing a client put there."""
        planned = copy.copy(sampling_params)
        extra = dict(planned.extra_args or {})
        params = dict(extra.get("kv_transfer_params") or {})
        if plan is not None:
            params[PLAN_KEY] = seal(plan, self._secret)
            offload, covered = params.get("max_offload_tokens"), plan.covered_tokens
            params["max_offload_tokens"] = (
                min(offload, covered) if type(offload) is int and offload >= 0 else covered
            )
        elif params.pop(PLAN_KEY, None) is None:
            return sampling_params
        extra["kv_transfer_params"] = params
        planned.extra_args = extra
        return planned

    def _estimate(self, plan: Plan, output: Any) -> Report:
        """What the first token tells: how much was read. Everything else that is covered counts
        as created; the engine's report, at the end, knows of blocks that were there already."""
        read = output.num_cached_tokens or 0
        blocks = range(read // self._block_size, plan.covered_tokens // self._block_size)
        return attribute_tokens(plan, self._block_size, [(Outcome.READ_DEVICE, read)], blocks)

    def _fetch_later(self, exchange: RequestContext, plan: Plan) -> None:
        before = exchange.fetching

        async def fetch() -> None:
            if before is not None:
                await before
            await self._fetch_report(exchange, plan)

        exchange.fetching = asyncio.get_running_loop().create_task(fetch())

    async def _fetch_report(self, exchange: RequestContext, plan: Plan) -> None:
        try:
            answers = await engine_rpc.call(self._engine, "report", plan.nonce)
        except Exception:
            logger.warning("The engine's report could not be fetched", exc_info=True)
            return
        for data in answers:
            if data is not None:
                exchange.reports[plan.nonce] = Report.from_wire(data)


def _shared_spans(plan: Plan) -> tuple[Span, ...]:
    """Return the spans that a caller without a session shares with others."""
    return tuple(span for span in plan.spans if span.scope is not Scope.SESSION)


def _take_report(output: Any) -> dict[str, Any] | None:
    params = getattr(output, "kv_transfer_params", None)
    if not params or PLAN_KEY not in params:
        return None
    data: dict[str, Any] = params.pop(PLAN_KEY)
    if not params:
        output.kv_transfer_params = None
    return data
