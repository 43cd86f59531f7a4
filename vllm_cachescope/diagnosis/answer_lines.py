"""The lines of answers, by which later requests are seen to carry them: keyed hashes, no text."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b, sha256
from typing import Any

from vllm_cachescope.prompt.request import Part, Region

TAIL_CHARACTERS = 2048
"""How much of an answer's end is looked at."""

MAX_LINES = 3
"""How many lines of an answer must come again."""

MAX_READ_CHARACTERS = 1 << 16
"""How much of a request's new parts is looked at."""

_MIN_CHARACTERS = 16
_BYTES = 8


def answer_lines(tail: str, secret: bytes) -> tuple[bytes, ...]:
    """Return the hashes of an answer's last lines; none if it has no line long enough to be told
    from others.

    Args:
        tail: the end of its text.
        secret: key of the hashes.
    """
    lines = list(_lines(tail[-TAIL_CHARACTERS:]))
    if len(tail) > TAIL_CHARACTERS:
        lines = lines[1:]  # Its beginning is cut off.
    return tuple(_hashes(lines[-MAX_LINES:], secret))


def carried_lines(parts: tuple[Part, ...], secret: bytes) -> frozenset[bytes]:
    """Return the hashes of the lines in what has come since the model's last answer: the results of
    tools, as a rule.

    Args:
        parts: the parts of a request.
        secret: key of the hashes.
    """
    found: set[bytes] = set()
    left = MAX_READ_CHARACTERS
    for part in reversed(parts):
        if part.region is not Region.MESSAGES or _is_answer(part):
            break
        for text in _texts(part.content):
            found.update(_hashes(_lines(text[:left]), secret))
            left -= len(text)
            if left <= 0:
                return frozenset(found)
    return frozenset(found)


def _is_answer(part: Part) -> bool:
    kind = part.content.get("type") if isinstance(part.content, dict) else None
    return part.role == "assistant" or (isinstance(kind, str) and kind.endswith("_call"))


def _texts(value: Any, depth: int = 4) -> Iterator[str]:
    """Yield the texts in a part's JSON."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in value:
            yield from _texts(inner, depth - 1)


def _lines(text: str) -> Iterator[str]:
    # A result that is JSON itself has its line ends escaped.
    for line in text.replace("\\n", "\n").split("\n"):
        if len(line := line.strip()) >= _MIN_CHARACTERS:
            yield line


def _hashes(lines: Iterable[str], secret: bytes) -> Iterator[bytes]:
    key = sha256(b"answer" + secret).digest()
    for line in lines:
        yield blake2b(line.encode("utf-8", "replace"), digest_size=_BYTES, key=key).digest()
