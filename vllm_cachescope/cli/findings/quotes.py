"""A quotation of what a place said before and what it says now, cut to the difference."""

from dataclasses import dataclass

from vllm_cachescope.cli.findings.edits import Edit
from vllm_cachescope.prompt.boundaries import common_prefix

_CONTEXT = 24  # characters on either side of the difference
_LONGEST = 60  # characters of the difference


@dataclass(frozen=True, slots=True)
class Quote:
    """What a place said before and says now.

    Attributes:
        path: the place, as in ``tools[1].input_schema.required``.
        char: how many characters of the text there come before the difference.
        before: what it said, with a little of what stands around.
        after: what it says.
    """

    path: str
    char: int
    before: str
    after: str


def quote(path: str, edit: Edit) -> Quote:
    """Return the quotation of an edit of the part at ``path``."""
    char = edit.char
    rest = edit.before[char:], edit.after[char:]
    tail = common_prefix(rest[0][::-1], rest[1][::-1])
    before, after = (_cut(text, char, len(text) - tail) for text in (edit.before, edit.after))
    return Quote(path + edit.inside, char, before, after)


def _cut(text: str, start: int, end: int) -> str:
    """Return what stands from ``start`` to ``end`` with its context, shortened in the middle."""
    first, last = max(0, start - _CONTEXT), min(len(text), end + _CONTEXT)
    middle = text[start:end]
    if len(middle) > _LONGEST:
        half = _LONGEST // 2
        middle = f"{middle[:half]}…{middle[-half:]}"
    head, foot = "…" if first else "", "…" if last < len(text) else ""
    return f"{head}{text[first:start]}{middle}{text[end:last]}{foot}"
