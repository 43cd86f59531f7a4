"""An estimate of the tokens in a part, for comparisons that cannot wait for the engine's count."""

from collections.abc import Mapping
from typing import Any

from vllm_cachescope.diagnosis.canonical import json_bytes

BYTES_PER_TOKEN = 4
"""Estimate for English text and code under byte-level BPE vocabularies. Only estimates use it:
counts that reach a bill come from the engine."""

_IMAGE_TYPES = ("image", "image_url", "input_image")
_IMAGE_TOKENS = 1600  # about what vision models spend on a large image; its base64 tells nothing


def estimate_tokens(content: Any, data: bytes) -> int:
    """Return about how many tokens a part has.

    Args:
        content: the part's content.
        data: its canonical bytes.
    """
    tokens = -(-len(data) // BYTES_PER_TOKEN)
    if not isinstance(content, dict):
        return tokens
    if is_media(content):
        return min(tokens, _IMAGE_TOKENS)
    inner = content.get("content")
    for block in inner if isinstance(inner, list) else ():
        if isinstance(block, dict) and is_media(block):
            tokens -= max(0, len(json_bytes(block)) // BYTES_PER_TOKEN - _IMAGE_TOKENS)
    return tokens


def is_media(block: Mapping[str, Any]) -> bool:
    """Whether a block is an image, or a document of bytes."""
    source = block.get("source")
    return block.get("type") in _IMAGE_TYPES or (
        block.get("type") == "document"
        and isinstance(source, dict)
        and source.get("type") == "base64"
    )
