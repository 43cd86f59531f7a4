"""A request's body as JSON.

pydantic's parser and serialiser are several times faster than `json` on a long prompt, and
stricter. What they do not take is left to `json`, which vLLM itself reads bodies with.
"""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json


def decode(raw: bytes) -> Any:
    """Return the JSON value in ``raw``; None if it is not JSON."""
    try:
        return from_json(raw)
    except ValueError:
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return None


def encode(value: Any) -> bytes:
    """Return ``value``, which `decode` made or which consists of the like, as JSON."""
    try:
        return to_json(value, inf_nan_mode="constants")
    except (PydanticSerializationError, ValueError):
        # Half of a surrogate pair, which UTF-8 cannot hold and an escape can.
        return json.dumps(value, separators=(",", ":")).encode()
