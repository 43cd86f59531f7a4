"""Claude Code's billing header: text in front of a system prompt that vLLM leaves out.

It looks like ``x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;``. Its nonce changes with
each request, so nothing after it could be read from the cache if it reached the prompt. What vLLM
0.32 does with it (`AnthropicServingMessages` and the chat renderer) is known here alone, and only
for the Messages format: parts of other formats are not to be given to these functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_cachescope.prompt.request import Part, Region

_HEADER = "x-anthropic-billing-header"


def is_dropped(part: Part) -> bool:
    """Tell whether vLLM leaves ``part`` out of the prompt. A breakpoint may stand on it all the
    same.

    True for a block of ``system`` that starts with the header, whatever else is in it, and for a
    text of the role ``system`` that is nothing but the header's line.
    """
    text = _header_text(part.content)
    if text is None:
        return False
    if part.path.startswith("system["):
        return True
    return _is_system(part) and not text.partition("\n")[2]


def drop_billing_headers(parts: Sequence[Part]) -> list[Part]:
    """Return the ``parts`` of one region as they reach the prompt.

    Parts that vLLM leaves out are dropped. From a text of which other lines remain, only the
    header's line is.
    """
    if parts and parts[0].region is not Region.SYSTEM and "system" not in [p.role for p in parts]:
        return list(parts)  # The usual conversation, looked through in a few microseconds.
    return [_without_line(part) for part in parts if not is_dropped(part)]


def drop_billing_blocks(system: Sequence[Any]) -> list[Any]:
    """Return the blocks of a body's ``system`` that reach the prompt."""
    return [block for block in system if _header_text(block) is None]


def _without_line(part: Part) -> Part:
    text = _header_text(part.content)
    if text is None or not _is_system(part):
        return part
    rest = text.partition("\n")[2]
    content = rest if isinstance(part.content, str) else {**part.content, "text": rest}
    return replace(part, content=content)


def _header_text(content: object) -> str | None:
    """Return the text of a string or a text block that starts with the header."""
    if isinstance(content, Mapping):
        content = content.get("text") if content.get("type") == "text" else None
    return content if isinstance(content, str) and content.startswith(_HEADER) else None


def _is_system(part: Part) -> bool:
    """Whether ``part`` is a system prompt that is one text, or of a message of that role."""
    return part.path == "system" or part.role == "system"
