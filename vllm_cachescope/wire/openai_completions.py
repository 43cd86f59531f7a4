"""Reads the body of ``POST /v1/completions`` (OpenAI's Completions).

The prompt has no blocks to mark: it is one part, shared and kept as a whole. A request may
carry several prompts; they share the one plan. ``cache_control`` at the top level sets the
lifetime and the scope of the prompt.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.wire.openai import finish
from vllm_cachescope.wire.parts import DEFAULT_TTL_S, PartCollector

_PARAMS = (
    "prompt_embeds",
    "suffix",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
)


def read(
    body: Mapping[str, Any],
    ttls: Collection[int],
    default_ttl_s: int = DEFAULT_TTL_S,
    strict: bool = False,
) -> PromptRequest:
    """Read a Completions request.

    Args:
        body: the request's JSON object.
        ttls: the lifetimes a client may ask for, in seconds.
        default_ttl_s: the lifetime in seconds of a breakpoint that names none.
        strict: whether to refuse what is wrong with the cache's own fields. If not, it is ignored,
            or read narrower.

    Raises:
        BadRequest: if strict, for anything wrong with the cache's own fields. Whatever else is
            malformed is left to the server to refuse.
    """
    parts = PartCollector(ttls, breakpoints=False, strict=strict)
    if body.get("prompt") is not None:
        parts.add(Region.MESSAGES, "prompt", body["prompt"])
    return finish(Protocol.COMPLETIONS, body, parts, _PARAMS, ttls, default_ttl_s)
