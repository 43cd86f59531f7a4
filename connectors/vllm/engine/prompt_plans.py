"""Which plan each prompt of an engine has: the one that came with it, or the operator's default."""

import secrets
from collections.abc import Mapping
from typing import Any

from vllm.v1.request import Request

from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, Span, unseal
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.caller import ANONYMOUS
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

REFUSED_TTL_S = 300
"""Lifetime of the blocks of a prompt whose plan was refused, which nobody can read."""


class PromptPlans:
    """Reads the plans that prompts carry, and makes those of prompts without one.

    Offline prompts, pooling requests and front ends other than ours carry none. Such a prompt is
    cached as an unmarked HTTP request without an API key is, and shares with those.

    Args:
        secret: key of the scope keys, of the owners and of the plans' MACs.
        default: scope and TTL of a prompt without a plan.
    """

    def __init__(self, secret: bytes, default: RegionDefault) -> None:
        self.secret = secret
        self._default = default
        self._keys = ScopeKeys(secret)
        self._owners = OwnerTags(secret)

    def of(self, request: Request) -> Plan:
        """Return the plan of a request's prompt. It has no nonce if it did not come with it."""
        if not carries_plan(request):
            return self._automatic(request)
        plan = unseal(_parameters(request)[PLAN_KEY], self.secret)
        if plan is not None:
            return plan
        key = self._keys.private_key(secrets.token_hex(16))
        span = Span(request.num_prompt_tokens, Scope.SESSION, key, REFUSED_TTL_S, covered=False)
        return Plan((span,), nonce="", owner=self._owners.of(Caller(ANONYMOUS)))

    def _automatic(self, request: Request) -> Plan:
        # vLLM 0.31 knows no sessions.
        caller = Caller(ANONYMOUS, getattr(request, "session_id", None))
        scope = self._default.scope
        key = self._keys.key(scope, caller, secrets.token_hex(16))
        # What nobody can read again is not worth a copy.
        readable = scope is not Scope.SESSION or caller.session is not None
        span = Span(request.num_prompt_tokens, scope, key, self._default.ttl_s, covered=readable)
        return Plan((span,), nonce="", owner=self._owners.of(caller))


def carries_plan(request: Request) -> bool:
    """Whether a request carries a plan, or something in the place of one."""
    return PLAN_KEY in _parameters(request)


def offload_covered(request: Request, plan: Plan) -> None:
    """Have vLLM copy no token behind the last breakpoint of a request's plan to the CPU tier, nor
    more tokens than the client allows."""
    params, covered = _mapping(request.kv_transfer_params), plan.covered_tokens
    allowed = params.get("max_offload_tokens")
    if type(allowed) is int and allowed >= 0:
        covered = min(allowed, covered)
    request.kv_transfer_params = {**params, "max_offload_tokens": covered}


def _parameters(request: Request) -> Mapping[str, Any]:
    """Return what the API side sends beside the prompt. Requests for pooling have another place
    for it than requests that generate."""
    if request.pooling_params is None:
        return _mapping(request.kv_transfer_params)
    return _mapping(request.pooling_params.extra_kwargs)


def _mapping(sent: Any) -> Mapping[str, Any]:
    # Any front end's clients may have sent it.
    return sent if isinstance(sent, Mapping) else {}
