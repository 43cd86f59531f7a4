"""The planner of requests whose prompts the server behind the gateway makes."""

from collections.abc import Mapping
from typing import Any

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm.gateway.prefixes import Prefixes, Render
from vllm_cachescope.connectors.vllm.plan_transport import without_plan_in
from vllm_cachescope.prompt.open_plan import OpenPlan, seal_open
from vllm_cachescope.prompt.plan import PLAN_KEY
from vllm_cachescope.prompt.plan_maker import PlanMaker
from vllm_cachescope.prompt.region_defaults import RegionDefaults
from vllm_cachescope.prompt.segments import Segment, segments
from vllm_cachescope.tenancy.caller import CallerDirectory


class OpenPlanner:
    """Plans the prompts of requests without their tokens.

    Args:
        config: the configuration.
        directory: the organisations, and what they may share.
    """

    def __init__(self, config: Config, directory: CallerDirectory) -> None:
        self._directory = directory
        self._plans = PlanMaker(config.secret_bytes())
        self._prefixes = Prefixes(directory.account)
        self._defaults = RegionDefaults(config.regions.of, directory.may_write_global)

    def purge(self, org: str | None, session: str | None) -> None:
        """Do `Prefixes.purge`."""
        self._prefixes.purge(org, session)

    async def plan(self, context: RequestContext, render: Render) -> OpenPlan:
        """Return the plan of a request's prompt.

        Args:
            context: the request.
            render: has the server render it.
        """
        cut: tuple[Segment, ...] = (self._defaults.whole(context.caller),)
        if context.request is not None:
            cut = segments(context.request, self._defaults.of(context.caller))
        with context.stage("boundaries"):
            beginnings = await self._prefixes.of(context, cut, render) if cut[1:] else [None]
        is_listed = self._directory.is_listed(context.caller.org)
        return self._plans.open_plan(cut, beginnings, context.caller, is_listed)


def has_one_prompt(body: Mapping[str, Any]) -> bool:
    """Whether a body of Completions, or of Chat Completions, has one prompt and not several."""
    prompt = body.get("prompt")
    return not isinstance(prompt, list) or all(isinstance(token, int) for token in prompt)


def with_plan(body: Mapping[str, Any], plan: OpenPlan, secret: bytes) -> dict[str, Any]:
    """Return a body with its prompt's plan in the place of any other, whatever a client has sent
    there, or elsewhere in place of what stands there.

    Args:
        body: the body.
        plan: the plan.
        secret: key of its MAC.
    """
    transfer = body.get("kv_transfer_params")
    own = without_plan_in(transfer) if isinstance(transfer, dict) else {}
    sent = {**body, "kv_transfer_params": {**own, PLAN_KEY: seal_open(plan, secret)}}
    for name, inner in (("vllm_xargs", None), ("sampling_params", "extra_args")):
        holder = sent.get(name)
        extra = holder.get(inner) if inner and isinstance(holder, dict) else holder
        if isinstance(extra, dict) and "kv_transfer_params" in extra:
            kept = {key: value for key, value in extra.items() if key != "kv_transfer_params"}
            sent[name] = {**holder, inner: kept} if inner and isinstance(holder, dict) else kept
    return sent
