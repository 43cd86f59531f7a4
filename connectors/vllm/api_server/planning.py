"""The planner of prompts: which tokens are shared how widely, and kept how long."""

import asyncio
from asyncio import Task
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm.api_server.boundaries import Boundaries, RenderedPrefix
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.prompt.plan_maker import PlanMaker
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.prompt.segments import Segment, segments
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf

_Rendered = tuple[tuple[Segment, ...], list[RenderedPrefix | None]]


class Planner:
    """Plans the prompts of requests.

    Args:
        state: the API server's state.
        config: the configuration.
        secret: key of the scope keys.
        account_of: returns who answers for an organisation, by its id.
    """

    def __init__(self, state: Any, config: Config, secret: bytes, account_of: AccountOf) -> None:
        self._plans = PlanMaker(secret)
        self._boundaries = Boundaries(state, self._on_tokenizing, account_of)
        self._defaults = {region: config.regions.of(region) for region in Region}

    def purge_renderings(self, org: str | None, session: str | None) -> None:
        """Drop what is kept of rendered prompts of ``org``, or of one session of ``org``; with
        None, of everyone."""
        self._boundaries.purge(org, session)

    async def plan(
        self, context: RequestContext, caller: Caller, tokens: list[int], text: str | None
    ) -> Plan:
        """Return the plan of one prompt of a request.

        Args:
            context: the request's context, which is the current one.
            caller: on whose behalf the prompt runs.
            tokens: the prompt's token ids, at least one.
            text: the prompt's rendered text, if known.
        """
        if context.request is None:
            return self.plan_whole(caller, len(tokens))
        cut, prefixes = await self._rendering(context, context.request)
        ends = await self._boundaries.ends(prefixes, context.request.protocol, tokens, text)
        return self._plans.plan(cut, ends, caller)

    def plan_whole(self, caller: Caller, tokens: int) -> Plan:
        """Return the plan of a prompt of ``tokens`` tokens that is cached as a whole, with the
        operator's defaults."""
        default = self._defaults[Region.MESSAGES]
        whole = Segment(None, default.scope, default.ttl_s, True)
        return self._plans.plan((whole,), [tokens], caller)

    def _on_tokenizing(self) -> None:
        """The server tokenises a prompt on another thread; render its segments meanwhile."""
        context = current_request.get()
        if context is not None and context.request is not None:
            self._rendering(context, context.request)

    def _rendering(self, context: RequestContext, request: PromptRequest) -> Task[_Rendered]:
        if context.rendering is None:
            rendering = self._render(request, context.body, context.caller)
            context.rendering = asyncio.get_running_loop().create_task(rendering)
        return context.rendering

    async def _render(
        self, request: PromptRequest, body: Mapping[str, Any], caller: Caller
    ) -> _Rendered:
        cut = segments(request, self._defaults)
        return cut, await self._boundaries.prefixes(request, body, cut, caller)
