"""The diagnostics that clients ask for, in the types of the `anthropic` and `openai` packages.

The client names an earlier request, and is told why the new one could not read what that one left.
The packages have fewer reasons than a `Diagnosis` has causes. Where none of them fits the answer is
"unavailable", as it is from Anthropic and OpenAI.
"""

from collections.abc import Sequence
from typing import Any

from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.repair.repair import Repair

# The first of these areas that changed is the reason. A changed `speed` counts as another model: so
# the docstring of the `anthropic` package's type has it.
_ANTHROPIC_ORDER = ("model", "tools", "system", "params", "messages")

_OPENAI_PARAMS = {
    "prompt_cache_key": "prompt_cache_key_changed",
    "text.format": "text_format_changed",
    "response_format": "text_format_changed",
    "reasoning.effort": "reasoning_effort_changed",
    "reasoning_effort": "reasoning_effort_changed",
    "text.verbosity": "verbosity_changed",
    "verbosity": "verbosity_changed",
    "service_tier": "service_tier_changed",
}
_OPENAI_AREAS = {
    "model": "model_changed",
    "tools": "tools_changed",
    "system": "input_changed",
    "messages": "input_changed",
}


def anthropic_diagnostics(
    request: PromptRequest,
    diagnosis: Diagnosis | None,
    *,
    pending: bool = False,
    is_known_here: bool = True,
) -> dict[str, Any] | None:
    """Return the ``diagnostics`` of a Messages response.

    Args:
        request: the request; it says whether diagnostics were asked for.
        diagnosis: the comparison with the request that it names, from `diagnose_against`, and
            once the engine has counted from `measure`; None if the caller's organisation has no
            such request.
        pending: whether the response has to go out before the comparison is done.
        is_known_here: whether a request that is not known here is known nowhere.

    Returns:
        None if nothing was asked for or nothing diverged.
    """
    if not request.diagnose or request.previous_id is None:
        return None
    if pending:
        return {"cache_miss_reason": None}
    if diagnosis is None:
        reason = "previous_message_not_found" if is_known_here else "unavailable"
        return {"cache_miss_reason": {"type": reason}}
    areas = {_anthropic_area(change) for change in diagnosis.changes} - {None}
    first = next((area for area in _ANTHROPIC_ORDER if area in areas), None)
    if first is None:
        return None if not areas else {"cache_miss_reason": {"type": "unavailable"}}
    if first == "params":
        return {"cache_miss_reason": {"type": "unavailable"}}
    changed = {
        "type": f"{first}_changed",
        "cache_missed_input_tokens": diagnosis.missed_tokens,
    }
    return {"cache_miss_reason": changed}


def openai_diagnostics(
    request: PromptRequest,
    diagnosis: Diagnosis | None,
    *,
    read_tokens: int | None = None,
    is_known_here: bool = True,
) -> dict[str, Any] | None:
    """Return the ``prompt_cache_diagnostics`` of a response.

    Args:
        request: the request; it says whether diagnostics were asked for.
        diagnosis: the comparison with the request of the response that it names, from
            `diagnose_against`, and once the engine has counted from `measure`; None if the
            caller's organisation has no such response.
        read_tokens: tokens read from the cache, once known.
        is_known_here: whether a response that is not known here is known nowhere.

    Returns:
        None if nothing was asked for.
    """
    if not request.diagnose:
        return None
    if diagnosis is None:
        return {"type": "comparison_response_not_found" if is_known_here else "unavailable"}
    reason = next((r for change in diagnosis.changes if (r := _openai_reason(change))), None)
    diverges = any(change.diverges for change in diagnosis.changes)
    # In the package a `reason` is "the reason prompt cache reuse did not occur"
    # (`PromptCacheDiagnosticsCacheMiss`). If everything was read that could be, there is none,
    # whatever the client changed.
    reused = diagnosis.measured and not diagnosis.missed_tokens
    if reused or (reason is None and not diverges):
        # The client changed nothing. That the cache lost the tokens is no reason of the package's.
        hit = read_tokens is None or read_tokens > 0
        return {"type": "cache_hit" if hit else "unavailable"}
    if reason is None:
        return {"type": "unavailable"}
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": diagnosis.missed_tokens,
        "comparison_reusable_tokens": diagnosis.shared_tokens,
    }


def early_answer(request: PromptRequest) -> dict[str, Any] | None:
    """Return the diagnostics of a response that has to go out before the comparison is done."""
    if request.protocol is Protocol.MESSAGES:
        return anthropic_diagnostics(request, None, pending=True)
    return openai_diagnostics(request, None, is_known_here=False)


def with_repairs(
    request: PromptRequest, answer: dict[str, Any] | None, repairs: Sequence[Repair]
) -> dict[str, Any] | None:
    """Return the diagnostics ``answer`` with what was put right in ``request``, if anything was
    and diagnostics were asked for."""
    if not repairs or not request.diagnose:
        return answer
    if answer is None:
        answer = {"cache_miss_reason": None}
    return {**answer, "repaired": [repair.to_dict() for repair in repairs]}


def _anthropic_area(change: Change) -> str | None:
    if change.names == ("speed",):
        return "model"
    return change.area if change.diverges else None


def _openai_reason(change: Change) -> str | None:
    if change.kind is ChangeKind.HISTORY_COMPACTED:
        return "context_compacted"
    if change.area == "params":
        return _param_reason(change.path)
    return _OPENAI_AREAS.get(change.area)


def _param_reason(path: str) -> str | None:
    """Return the reason of the longest entry that ``path`` is or lies in.

    Parameters are compared one level deep: a change of `response_format` has the path
    ``response_format.type``.
    """
    while path not in _OPENAI_PARAMS and "." in path:
        path = path.rpartition(".")[0]
    return _OPENAI_PARAMS.get(path)
