"""The diagnostics that clients ask for, as the `anthropic` and `openai` packages type them.

Both compare a request with one the client names and know fewer causes than `Diagnosis`; where no
reason of theirs fits, they say "unavailable" as theirs do.
"""

from collections.abc import Mapping
from typing import Any

from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.request import PromptRequest

# vLLM mixes the salt into the hash of the first block.
_EXTRA_FIELDS = ("service_tier", "speed", "verbosity", "prompt_cache_key", "cache_salt")
_BETAS = "anthropic-beta"

# `model_changed` covers speed, as the docstring of the `anthropic` package's type has it.
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


def extra_fields(body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """Return what is to be compared besides the prompt and its parameters.

    Args:
        body: the client's body.
        headers: its headers, names in lower case. The order of beta names means nothing.
    """
    extra: dict[str, Any] = {
        name: body[name] for name in _EXTRA_FIELDS if body.get(name) is not None
    }
    if betas := headers.get(_BETAS):
        extra[_BETAS] = sorted(name.strip() for name in betas.split(","))
    return extra


def anthropic_diagnostics(
    request: PromptRequest, diagnosis: Diagnosis | None, *, pending: bool = False
) -> dict[str, Any] | None:
    """Return the ``diagnostics`` of a Messages response.

    Args:
        request: the request; it says whether diagnostics were asked for.
        diagnosis: the comparison with the request it names (`diagnose_against`), and once the
            engine has counted, what `measure` makes of it; None if that request is not known to
            the caller's organisation.
        pending: whether the response has to go out before the comparison is done.

    Returns:
        None if nothing was asked for or nothing diverged.
    """
    if not request.diagnose or request.previous_id is None:
        return None
    if pending:
        return {"cache_miss_reason": None}
    if diagnosis is None:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    areas = {_anthropic_area(change) for change in diagnosis.changes} - {None}
    first = next((area for area in _ANTHROPIC_ORDER if area in areas), None)
    if first is None:
        return None if not areas else {"cache_miss_reason": {"type": "unavailable"}}
    if first == "params":
        return {"cache_miss_reason": {"type": "unavailable"}}
    reason = {
        "type": f"{first}_changed",
        "cache_missed_input_tokens": diagnosis.missed_tokens,
    }
    return {"cache_miss_reason": reason}


def openai_diagnostics(
    request: PromptRequest, diagnosis: Diagnosis | None, *, read_tokens: int | None = None
) -> dict[str, Any] | None:
    """Return the ``prompt_cache_diagnostics`` of a response.

    Args:
        request: the request; it says whether diagnostics were asked for.
        diagnosis: the comparison with the response it names (`diagnose_against`), and once the
            engine has counted, what `measure` makes of it; None if that response is not known to
            the caller's organisation.
        read_tokens: tokens read from the cache, once known.

    Returns:
        None if nothing was asked for.
    """
    if not request.diagnose:
        return None
    if diagnosis is None:
        return {"type": "comparison_response_not_found"}
    reason = next((r for change in diagnosis.changes if (r := _openai_reason(change))), None)
    diverges = any(change.diverges for change in diagnosis.changes)
    # To the package a `reason` is "the reason prompt cache reuse did not occur"
    # (`PromptCacheDiagnosticsCacheMiss`): there is none, whatever changed, where all that could be
    # read was read.
    reused = diagnosis.measured and not diagnosis.missed_tokens
    if reused or (reason is None and not diverges):
        # Nothing the client did; that the cache lost it has no word here.
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
    """Return the reason of the longest entry that ``path`` is or lies in: parameters are compared
    one level deep, `response_format` as ``response_format.type`` and so on."""
    while path not in _OPENAI_PARAMS and "." in path:
        path = path.rpartition(".")[0]
    return _OPENAI_PARAMS.get(path)
