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
    planned: Any = copy.copy(params)
    sealed = {PLAN_KEY: seal(plan, secret)}
    if hasattr(planned, "extra_kwargs"):
        planned.extra_kwargs = {**(planned.extra_kwargs or {}), **sealed}
    else:
        extra = planned.extra_args or {}
        transfer = {**(extra.get("kv_transfer_params") or {}), **sealed}
        planned.extra_args = {**extra, "kv_transfer_params": transfer}
    result: _Params = planned
    return result


def without_plan(params: _Params) -> _Params:
    """Return the parameters of a prompt to generate for without a plan: a copy if they have one."""
    given: Any = params
    transfer = dict((given.extra_args or {}).get("kv_transfer_params") or {})
    if PLAN_KEY not in transfer:
        return params
    del transfer[PLAN_KEY]
    bare = copy.copy(given)
    bare.extra_args = {**given.extra_args, "kv_transfer_params": transfer}
    result: _Params = bare
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
