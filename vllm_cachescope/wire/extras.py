"""Fields of a request, besides its prompt and its parameters, that may change what is read from the
cache."""

from collections.abc import Mapping
from typing import Any

# The salt is here since vLLM mixes it into the hash of the first block.
_FIELDS = ("service_tier", "speed", "verbosity", "prompt_cache_key", "cache_salt")
_BETAS = "anthropic-beta"


def extra_fields(body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields to be compared besides the prompt and its parameters.

    Args:
        body: the client's body.
        headers: its headers, names in lower case. The order of the names in ``anthropic-beta``
            means nothing: they are returned sorted.
    """
    extra: dict[str, Any] = {name: body[name] for name in _FIELDS if body.get(name) is not None}
    if betas := headers.get(_BETAS):
        extra[_BETAS] = sorted(name.strip() for name in betas.split(","))
    return extra
