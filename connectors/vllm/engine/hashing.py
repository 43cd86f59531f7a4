"""The hashing of blocks, with the scope key of each block in its hash.

vLLM looks up `generate_block_hash_extra_keys` by name whenever it hashes a block, so wrapping
that one function gives a block its scope on every tier: the prefix cache, the offloading tiers
and KV events all know blocks by hash alone, and every later hash chains on it.
"""

import hashlib
import hmac
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, Span, seal, unseal
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

UNPLANNED_TTL_S = 300

_HOOKED = "generate_block_hash_extra_keys"

_secret: bytes | None = None


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
        if _secret is None:
            return keys, next_mm_idx
        scope_key = (PLAN_KEY, plan_of(request).span_of(end_token_idx).key)
        return (*(keys or ()), scope_key), next_mm_idx

    generate_block_hash_extra_keys.is_scoped = True  # type: ignore[attr-defined]
    return generate_block_hash_extra_keys


def plan_of(request: Request) -> Plan:
    """Return the request's plan; a private one where it carries none made with our secret."""
    plan = getattr(request, "cachescope_plan", None)
    if plan is None:
        plan = _read_plan(request)
        request.cachescope_plan = plan  # type: ignore[attr-defined]
    return plan


def is_private(plan: Plan) -> bool:
    """Whether the plan stands in for one that was missing or refused."""
    return plan.nonce == ""


def _read_plan(request: Request) -> Plan:
    assert _secret is not None
    params = request.kv_transfer_params
    plan = unseal(params.get(PLAN_KEY), _secret) if params else None
    if plan is not None:
        return plan
    key = ScopeKeys(_secret).private_key(secrets.token_hex(16))
    span = Span(request.num_prompt_tokens, Scope.SESSION, key, UNPLANNED_TTL_S, covered=False)
    return Plan((span,), nonce="")


def enforce(secret: bytes) -> None:
    """Have every block hash in this process carry a scope key from here on.

    Raises:
        HookNotInForce: if hashes made by vLLM's own hasher do not differ with the scope key, or
            differ without it.
    """
    global _secret
    install()
    _secret = secret
    keys = ScopeKeys(secret)
    acme, other = Caller("acme", "s1"), Caller("other", "s1")
    hashes = {
        who: _hashes(
            Plan(
                (
                    Span(32, Scope.GLOBAL, keys.key(Scope.GLOBAL, caller, "n"), 300),
                    Span(64, Scope.ORG, keys.key(Scope.ORG, caller, "n"), 300),
                ),
                nonce="n",
            ),
            secret,
        )
        for who, caller in (("acme", acme), ("acme again", acme), ("other", other))
    }
    unplanned = _hashes(None, secret)
    in_force = (
        hashes["acme"] == hashes["acme again"]
        and hashes["acme"][:2] == hashes["other"][:2]
        and set(hashes["acme"][2:]).isdisjoint(hashes["other"][2:])
        and set(unplanned).isdisjoint(hashes["acme"])
        and set(unplanned).isdisjoint(_hashes(None, secret))
    )
    if not in_force:
        raise HookNotInForce(
            "vLLM's block hashes do not follow the scope keys: CacheScope's hash hook was replaced "
            "or this vLLM hashes blocks in another way. Refusing to start, since tenants would "
            "share blocks."
        )


def digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of ``settings`` and of everything else that two engines must have in common
    for equal prompts of one scope to have equal block hashes. Not before the first request."""
    secret = _secret or b""
    text = json.dumps([settings, kv_cache_utils.NONE_HASH.hex()], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:16]


def _hashes(plan: Plan | None, secret: bytes) -> list[bytes]:
    """Hash 64 tokens in blocks of 16, as the engine does."""
    params = {PLAN_KEY: seal(plan, secret)} if plan else None
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
