"""Which plan each prompt of an engine has: the one that came with it, or the operator's default."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import Request

from vllm_cachescope.config import Config
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt import plan_hint
from vllm_cachescope.prompt.global_scope import org_default
from vllm_cachescope.prompt.open_plan import CUT_KEY, unseal_open
from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, Span, unseal
from vllm_cachescope.prompt.plan_hint import HintRefused, PlanHint, Refusal
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

REFUSED_TTL_S = 300
"""Lifetime of the blocks of a prompt whose plan was refused, which nobody can read."""


@dataclass(frozen=True, slots=True)
class PlanRules:
    """What the operator says of prompts that come without a plan of the API side.

    Attributes:
        default: scope and TTL of a prompt that says neither.
        directory: the organisations, and what they may share.
        allowed_ttls: the TTLs that a hint may name, in seconds.
        trusts_front_end: whether nobody but a trusted front end can put prompts to the engine, so
            that salts and hints name organisations.
    """

    default: RegionDefault
    directory: CallerDirectory
    allowed_ttls: Collection[int] = field(default=(300, 3600))
    trusts_front_end: bool = False

    @classmethod
    def of(cls, config: Config, secret: bytes) -> "PlanRules":
        """Return what a configuration says.

        Raises:
            ConfigError: if a file that it names cannot be read.
        """
        directory = CallerDirectory(
            secret,
            config.tenant_names(),
            config.org_header,
            global_writers=config.global_writer_ids(),
        )
        default = config.regions.of(Region.MESSAGES)
        return cls(default, directory, config.allowed_ttls, config.front_end.trusted)


@dataclass(frozen=True, slots=True)
class FoundPlan:
    """The plan of a prompt, and what did not count.

    Attributes:
        plan: the plan. It has no nonce if it did not come from the API side.
        refusal: why a hint in ``kv_hints`` does not count; None if there was none, or it does.
    """

    plan: Plan
    refusal: Refusal | None = None


class PromptPlans:
    """Reads the plans that prompts carry, and makes those of prompts without one.

    Offline prompts, pooling requests and front ends other than ours carry none. Such a prompt is
    cached as an unmarked HTTP request is: its ``cache_salt`` stands for the organisation, and
    without one it shares with requests without an API key.

    Args:
        secret: key of the scope keys, of the owners and of the plans' MACs.
        rules: what the operator says.
    """

    def __init__(self, secret: bytes, rules: PlanRules) -> None:
        self.secret = secret
        self._rules = rules
        self._keys = ScopeKeys(secret)
        self._owners = OwnerTags(secret)

    def of(self, request: Request) -> FoundPlan:
        """Return the plan of a request's prompt."""
        if carries_plan(request):
            return FoundPlan(self._sealed(request))
        try:
            hint = self._hint(request)
            if hint is not None:
                return FoundPlan(self._hinted(request, hint))
        except HintRefused as refused:
            return FoundPlan(self._automatic(request), refused.reason)
        return FoundPlan(self._automatic(request))

    def _sealed(self, request: Request) -> Plan:
        sent = _parameters(request)[PLAN_KEY]
        if isinstance(sent, Mapping) and CUT_KEY in sent:
            opened = unseal_open(sent, self.secret)
            tokens = request.prompt_token_ids
            if opened is not None and tokens:
                return opened.closed(tokens)
        elif (plan := unseal(sent, self.secret)) is not None:
            return plan
        key = self._keys.private_key(secrets.token_hex(16))
        span = Span(request.num_prompt_tokens, Scope.SESSION, key, REFUSED_TTL_S, covered=False)
        return Plan((span,), nonce="", owner=self._owners.of(Caller(ANONYMOUS)))

    def _automatic(self, request: Request) -> Plan:
        org = self._rules.directory.of_salt(request.cache_salt, self._rules.trusts_front_end)
        return self._whole(request, Caller(org, request.session_id or None))

    def _whole(self, request: Request, caller: Caller) -> Plan:
        """Return the plan of a prompt that is cached as a whole, by the operator's default."""
        default, directory = self._rules.default, self._rules.directory
        if not directory.may_write_global(caller.org):
            default = org_default(default)
        scope = default.scope
        key = self._keys.key(scope, caller, secrets.token_hex(16))
        # What nobody can read again is not worth a copy.
        readable = scope is not Scope.SESSION or caller.session is not None
        span = Span(request.num_prompt_tokens, scope, key, default.ttl_s, covered=readable)
        return self._plan((span,), caller)

    def _plan(self, spans: tuple[Span, ...], caller: Caller) -> Plan:
        is_listed = self._rules.directory.is_listed(caller.org)
        return Plan(spans, nonce="", owner=self._owners.of(caller, is_listed))

    def _hint(self, request: Request) -> PlanHint | None:
        """Return the hint that came with a request; None if none did.

        Raises:
            HintRefused: if it does not count.
        """
        envelope: Any = request.kv_hints
        if envelope is None:
            return None
        ours = [action for action in envelope.actions if action.action_type == plan_hint.ACTION]
        if not ours:
            return None
        if not self._rules.trusts_front_end:
            raise HintRefused(Refusal.UNTRUSTED)
        if len(ours) > 1:
            raise HintRefused(Refusal.SCHEMA)
        return plan_hint.read(ours[0].action_version, ours[0].payload)

    def _hinted(self, request: Request, hint: PlanHint) -> Plan:
        rules = self._rules
        try:
            org = rules.directory.of_name(hint.organisation)
        except BadRequest:
            raise HintRefused(Refusal.ORGANISATION) from None
        caller = Caller(org, hint.session or request.session_id or None)
        if hint.spans is None:
            return self._whole(request, caller)
        if not {span.ttl_s for span in hint.spans} <= {*rules.allowed_ttls}:
            raise HintRefused(Refusal.TTL)
        nonce, length = secrets.token_hex(16), request.num_prompt_tokens
        spans = hint.spans_of(length, caller, self._keys, nonce)
        if spans[0].scope is Scope.GLOBAL and not rules.directory.may_write_global(org):
            raise HintRefused(Refusal.GLOBAL)
        return self._plan(tuple(spans), caller)


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
