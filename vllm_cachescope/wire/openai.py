"""The common fields of the OpenAI formats: cache options, and leading system messages."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.wire.breakpoints import MAX_BREAKPOINTS
from vllm_cachescope.wire.fields import is_text, read_choice, read_flag, read_text, read_ttl
from vllm_cachescope.wire.mistakes import Mistakes
from vllm_cachescope.wire.parts import PartCollector
from vllm_cachescope.wire.session_end import read_session_over

_OPTION = IgnoredReason.OPTION
_OPTIONS = ("mode", "ttl", "comparison_response_id")


@dataclass(frozen=True, slots=True)
class _Options:
    mode: str | None
    ttl_s: int | None
    prewarm: bool
    previous_id: str | None


def finish(
    protocol: Protocol,
    body: Mapping[str, Any],
    parts: PartCollector,
    params: tuple[str, ...],
    ttls: Collection[int],
    default_ttl_s: int,
) -> PromptRequest:
    """Read the cache fields of the whole request and return it with the ``parts`` collected.

    ``params`` names the fields of the body, besides the parts, that can change the prompt.

    Raises:
        BadRequest: if the parts are read strictly, for anything wrong with a cache field or a
            marker.
    """
    mistakes = parts.mistakes
    options = _read_options(protocol, body.get("prompt_cache_options"), ttls, mistakes)
    retention = body.get("prompt_cache_retention")
    ttl_s = options.ttl_s or mistakes.read(_OPTION, _read_retention, retention, ttls)
    key = mistakes.read(_OPTION, read_text, body.get("prompt_cache_key"), "prompt_cache_key")
    session_over = read_session_over(body, mistakes)
    session, model = body.get("session_id"), body.get("model")
    # The implicit breakpoint takes one of the four.
    explicit = options.mode == "explicit"
    marked = parts.settle(
        body.get("cache_control"),
        default_ttl_s if ttl_s is None else ttl_s,
        keep_breakpoints=MAX_BREAKPOINTS - (not explicit),
    )
    return PromptRequest(
        protocol=protocol,
        model=model if isinstance(model, str) else "",
        parts=marked.parts,
        # Breakpoints leave OpenAI's implicit one in place; Anthropic's markers replace it.
        automatic=not explicit
        and not marked.mixed
        and (options.mode == "implicit" or not marked.controlled),
        ttl_s=ttl_s,
        session=session if isinstance(session, str) and is_text(session) else key,
        prewarm=options.prewarm,
        session_over=session_over,
        params={name: body[name] for name in params if body.get(name) is not None},
        diagnose=options.previous_id is not None,
        previous_id=options.previous_id,
        ignored=marked.ignored,
    )


def count_leading_system(messages: object) -> int:
    """Return how many messages stand before the first that is neither system nor developer."""
    count = 0
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer"):
            break
        count += 1
    return count


def _read_options(
    protocol: Protocol, value: object, ttls: Collection[int], mistakes: Mistakes
) -> _Options:
    path = "prompt_cache_options"
    # Only Responses can fill the cache without generating (`openai` package, 3.52).
    keys = (*_OPTIONS, "prewarm") if protocol is Protocol.RESPONSES else _OPTIONS
    fields = None if value is None else mistakes.read_object(value, path, keys, _OPTION)
    if fields is None:
        return _Options(None, None, False, None)
    prewarm = fields.get("prewarm") if "prewarm" in keys else None
    return _Options(
        mistakes.read(_OPTION, _read_mode, fields.get("mode"), f"{path}.mode"),
        mistakes.read(IgnoredReason.UNKNOWN_TTL, read_ttl, fields.get("ttl"), f"{path}.ttl", ttls),
        bool(mistakes.read(_OPTION, read_flag, prewarm, f"{path}.prewarm")),
        mistakes.read(
            _OPTION,
            read_text,
            fields.get("comparison_response_id"),
            f"{path}.comparison_response_id",
        ),
    )


def _read_mode(value: object, path: str) -> str | None:
    return None if value is None else read_choice(value, path, ("implicit", "explicit"))


def _read_retention(value: object, ttls: Collection[int]) -> int | None:
    if value is None:
        return None
    path = "prompt_cache_retention"
    # Earlier `openai` packages spelt it with a hyphen.
    choices = ("in_memory", "in-memory", *(("24h",) if 86400 in ttls else ()))
    return 86400 if read_choice(value, path, choices) == "24h" else None
