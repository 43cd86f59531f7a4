"""The planner of prompts: which tokens are shared how widely, and kept how long."""

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm.api_server.boundaries import Boundaries, RenderedPrefix
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.prompt.plan_maker import PlanMaker
from vllm_cachescope.prompt.region_defaults import RegionDefaults
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.prompt.segments import Segment, segments
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.tenancy.owner_tags import readers
from vllm_cachescope.tenancy.scope import Caller

_Rendered = tuple[tuple[Segment, ...], list[RenderedPrefix | None]]


class Planner:
    """Plans the prompts of requests.

    Args:
        state: the API server's state.
        config: the configuration.
        secret: key of the scope keys.
        directory: the organisations, and what they may share.
    """

    def __init__(
        self, state: Any, config: Config, secret: bytes, directory: CallerDirectory
    ) -> None:
        self._directory = directory
        self._plans = PlanMaker(secret)
        self._boundaries = Boundaries(
            state, self._on_tokenizing, directory.account, config.token_bytes
        )
        self._defaults = RegionDefaults(config.regions.of, directory.may_write_global)

    def purge_renderings(self, org: str | None, session: str | None) -> None:
        """Drop what is kept of rendered prompts of ``org``, or of one session of ``org``; with
        None, of everyone."""
        self._boundaries.purge(org, session)

    async def renders_tools_behind_system(self) -> bool | None:
        """See `Boundaries.renders_tools_behind_system`."""
        return await self._boundaries.renders_tools_behind_system()

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
        if context.rendering is None:
            self._render_later(context, context.request)
        assert context.rendering is not None
        cut, prefixes = await context.rendering
        with context.stage("boundaries"):
            ends = await self._boundaries.ends(prefixes, context.request.protocol, tokens, text)
        return self._plan(cut, ends, caller)

    def plan_whole(self, caller: Caller, tokens: int) -> Plan:
        """Return the plan of a prompt of ``tokens`` tokens that is cached as a whole, with the
        operator's defaults."""
        return self._plan((self._defaults.whole(caller),), [tokens], caller)

    def _on_tokenizing(self) -> Caller | None:
        """The server tokenises a prompt on another thread; render its segments meanwhile. Return
        who may find what is kept of its tokens: whoever may read all of it."""
        context = current_request.get()
        if context is None or context.request is None:
            return None
        cut = self._render_later(context, context.request)
        # Scopes only narrow along a prompt.
        return readers(cut[-1].scope, context.caller)

    def _render_later(self, context: RequestContext, request: PromptRequest) -> tuple[Segment, ...]:
        """Have the segments of a prompt rendered, unless they are already; return them."""
        cut = segments(request, self._defaults.of(context.caller))
        if context.rendering is None:
            rendering = self._render(request, context, cut)
            context.rendering = asyncio.get_running_loop().create_task(rendering)
        return cut

    async def _render(
        self, request: PromptRequest, context: RequestContext, cut: tuple[Segment, ...]
    ) -> _Rendered:
        with context.stage("boundaries"):
            found = await self._boundaries.prefixes(request, context.body, cut, context.caller)
        return cut, found

    def _plan(self, cut: Sequence[Segment], ends: Sequence[int], caller: Caller) -> Plan:
        return self._plans.plan(cut, ends, caller, self._directory.is_listed(caller.org))
