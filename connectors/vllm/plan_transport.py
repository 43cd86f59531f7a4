"""The transport of plans to the engine, in a prompt's parameters, and of reports back."""

import copy
from typing import Any, TypeVar

from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, seal

_Params = TypeVar("_Params")


def with_plan(params: _Params, plan: Plan, secret: bytes) -> _Params:
    """Return a copy of a prompt's parameters with its plan in the place of any other.

    Args:
        params: vLLM's `SamplingParams` or `PoolingParams`.
        plan: the plan.
        secret: key of its MAC.
    """
    return _with(params, {PLAN_KEY: seal(plan, secret)})


def without_plan(params: _Params) -> _Params:
    """Return a prompt's parameters without a plan, whatever a client has sent in its place: a copy
    if they have one."""
    given: Any = params
    if hasattr(given, "extra_kwargs"):
        sent = given.extra_kwargs
    else:
        sent = (given.extra_args or {}).get("kv_transfer_params")
    is_free = sent is None or (isinstance(sent, dict) and PLAN_KEY not in sent)
    return params if is_free else _with(params, {})


def without_plan_in(transfer: dict[str, Any]) -> dict[str, Any]:
    """Return the `kv_transfer_params` that a client has sent without what stands in the place of a
    plan."""
    return {name: value for name, value in transfer.items() if name != PLAN_KEY}


def _with(params: _Params, own: dict[str, Any]) -> _Params:
    planned: Any = copy.copy(params)
    if hasattr(planned, "extra_kwargs"):
        planned.extra_kwargs = {**without_plan_in(planned.extra_kwargs or {}), **own}
    else:
        extra = planned.extra_args or {}
        sent = extra.get("kv_transfer_params")
        # A client may have sent anything, in `vllm_xargs`.
        transfer = {**(without_plan_in(sent) if isinstance(sent, dict) else {}), **own}
        planned.extra_args = {**extra, "kv_transfer_params": transfer}
    result: _Params = planned
    return result


def take_report(output: Any) -> dict[str, Any] | None:
    """Take the engine's report off an output of vLLM's, and return it as it travels; None if there
    is none."""
    params = getattr(output, "kv_transfer_params", None)
    if not params or PLAN_KEY not in params:
        return None
    data: dict[str, Any] = params.pop(PLAN_KEY)
    if not params:
        output.kv_transfer_params = None
    return data
