"""The hashing of blocks, with the scope key of each block and its LoRA adapter in its hash.

vLLM looks up `generate_block_hash_extra_keys` by name whenever it hashes a block, so wrapping
that one function gives a block its scope on every tier: the prefix cache, the offloading tiers
and KV events all know blocks by hash alone, and every later hash chains on it.
"""

import hashlib
import hmac
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from vllm_cachescope.connectors.vllm.engine.adapters import Adapters, is_unknown
from vllm_cachescope.connectors.vllm.engine.prompt_plans import PlanRules, PromptPlans
from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, Span, seal
from vllm_cachescope.prompt.plan_hint import Refusal
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

_HOOKED = "generate_block_hash_extra_keys"

_plans: PromptPlans | None = None
_adapters: Adapters | None = None


class HookNotInForce(RuntimeError):
    """Block hashes do not carry scope keys, so blocks would be shared across scopes."""


def install() -> None:
    """Wrap vLLM's hash function in every module that has imported it. Installing twice is harmless.

    The wrapper changes nothing until `enforce` is called.

    Raises:
        HookNotInForce: if this vLLM has no such function.
    """
    original = getattr(kv_cache_utils, _HOOKED, None)
    if original is None:
        raise HookNotInForce(f"this vLLM has no {kv_cache_utils.__name__}.{_HOOKED}")
    if getattr(original, "is_scoped", False):
        return
    scoped = _scoped(original)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, _HOOKED, None) is original:
            setattr(module, _HOOKED, scoped)


def _scoped(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        if _plans is None:
            return keys, next_mm_idx
        scope_key = plan_of(request).span_of(end_token_idx).key
        if (adapter := adapter_of(request)) is not None:
            scope_key = f"{scope_key}:{adapter}"
        # As bytes, and ASCII: KV events publish it. Routers take a string for the hash of a
        # picture, and Dynamo drops every event that has bytes which are no UTF-8.
        return (*(keys or ()), (PLAN_KEY, scope_key.encode())), next_mm_idx

    generate_block_hash_extra_keys.is_scoped = True  # type: ignore[attr-defined]
    return generate_block_hash_extra_keys


def plan_of(request: Request) -> Plan:
    """Return the plan of the request's prompt, the same one whenever it is asked for."""
    plan = getattr(request, "cachescope_plan", None)
    if plan is None:
        assert _plans is not None
        found = _plans.of(request)
        plan = found.plan
        if is_unknown(adapter_of(request)):
            plan = plan.uncovered()
        request.cachescope_plan = plan  # type: ignore[attr-defined]
        request.cachescope_refusal = found.refusal  # type: ignore[attr-defined]
    return plan


def refusal_of(request: Request) -> Refusal | None:
    """Return why the hint of a plan that came with a request does not count; None if it does, or
    none came."""
    plan_of(request)
    refusal: Refusal | None = request.cachescope_refusal  # type: ignore[attr-defined]
    return refusal


def adapter_of(request: Request) -> str | None:
    """Return what the request's LoRA adapter is, the same whenever it is asked for; None if it has
    none. See `Adapters.identity`."""
    lora = request.lora_request
    if lora is None or _adapters is None:
        return None
    adapter: str | None = getattr(request, "cachescope_adapter", None)
    if adapter is None:
        adapter = _adapters.identity(lora)
        request.cachescope_adapter = adapter  # type: ignore[attr-defined]
    return adapter


def enforce(secret: bytes, rules: PlanRules, adapters: Adapters) -> None:
    """Have every block hash in this process carry a scope key from here on.

    Args:
        secret: key of the scope keys and of the plans' MACs.
        rules: what becomes of prompts that come without a plan.
        adapters: the engine's LoRA adapters.

    Raises:
        HookNotInForce: if hashes made by vLLM's own hasher do not differ with the scope key, or
            differ without it.
    """
    global _plans, _adapters
    install()
    # Of a scope that the probes below tell from others, whatever the operator's default is.
    probed = PlanRules(RegionDefault(Scope.ORG, 300), CallerDirectory(secret, {}, None))
    _plans = PromptPlans(secret, probed)
    keys = ScopeKeys(secret)

    def carried(caller: Caller, *cuts: tuple[int, Scope]) -> dict[str, Any]:
        spans = tuple(Span(end, scope, keys.key(scope, caller, "n"), 300) for end, scope in cuts)
        return {PLAN_KEY: seal(Plan(spans, nonce="n"), secret)}

    cuts = (32, Scope.GLOBAL), (64, Scope.ORG)
    acme, other = _hashes(carried(Caller("acme"), *cuts)), _hashes(carried(Caller("other"), *cuts))
    anonymous = carried(Caller(ANONYMOUS), (64, Scope.ORG))
    unplanned = _hashes(None)
    forged = {PLAN_KEY: {**anonymous[PLAN_KEY], "mac": ""}}
    refused = _hashes(forged)
    in_force = (
        acme == _hashes(carried(Caller("acme"), *cuts))
        and acme[:2] == other[:2]
        and set(acme[2:]).isdisjoint(other[2:])
        and unplanned == _hashes(None) == _hashes(anonymous)
        and set(unplanned).isdisjoint(acme)
        and set(refused).isdisjoint([*unplanned, *acme, *_hashes(forged)])
    )
    if not in_force:
        raise HookNotInForce(
            "vLLM's block hashes do not follow the scope keys: CacheScope's hash hook was replaced "
            "or this vLLM hashes blocks in another way. Refusing to start, since tenants would "
            "share blocks."
        )
    _plans, _adapters = PromptPlans(secret, rules), adapters


def digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of ``settings`` and of everything else that two engines must have in common
    for equal prompts of one scope to have equal block hashes. Not before the first request."""
    secret = b"" if _plans is None else _plans.secret
    text = json.dumps([settings, kv_cache_utils.NONE_HASH.hex()], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:16]


def _hashes(params: Mapping[str, Any] | None) -> list[bytes]:
    """Hash 64 tokens with the given `kv_transfer_params` in blocks of 16, as the engine does."""
    # The engine sets the root of all hashes only after it has made its connector.
    rooted = hasattr(kv_cache_utils, "NONE_HASH")
    if not rooted:
        kv_cache_utils.NONE_HASH = kv_cache_utils.BlockHash(bytes(32))
    request = Request(
        request_id="cachescope-probe",
        prompt_token_ids=list(range(64)),
        sampling_params=SamplingParams(extra_args={"kv_transfer_params": params}),
        pooling_params=None,
        block_hasher=kv_cache_utils.get_request_block_hasher(16, sha256),
    )
    if not rooted:
        del kv_cache_utils.NONE_HASH
    return list(request.block_hashes)
