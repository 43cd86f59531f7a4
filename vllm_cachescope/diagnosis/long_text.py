"""A long text, worked on in slices: one call for all of it would keep every other thread of the
process waiting, and those that answer other clients among them."""

from collections.abc import Iterator

SLICE = 2**16
"""Characters that are worked on at once: less than a millisecond's work."""


def is_long(text: str) -> bool:
    """Tell whether a text is worked on in more than one slice."""
    return len(text) > SLICE


def utf8(text: str) -> bytes:
    """Return a text as UTF-8, halves of surrogate pairs too."""
    if not is_long(text):
        return text.encode("utf-8", "surrogatepass")
    # Of large pieces, `join` lets other threads go on.
    return b"".join([piece.encode("utf-8", "surrogatepass") for piece in _slices(text)])


def evened(text: str) -> str:
    """Return the words of a text with one space between two of them."""
    if not is_long(text):
        return " ".join(text.split())
    return "".join(_evened_slices(text))


def is_even(text: str) -> bool:
    """Tell whether a text is as `evened` would return it."""
    at = 0
    for piece in _evened_slices(text):
        if not text.startswith(piece, at):
            return False
        at += len(piece)
    return at == len(text)


def _slices(text: str) -> Iterator[str]:
    return (text[at : at + SLICE] for at in range(0, len(text), SLICE))


def _evened_slices(text: str) -> Iterator[str]:
    # A word may go on from one slice to the next.
    is_first, is_behind_space = True, False
    for piece in _slices(text):
        words = " ".join(piece.split())
        is_behind_space |= piece[0].isspace()
        if words:
            if is_behind_space and not is_first:
                yield " "
            yield words
            is_first, is_behind_space = False, piece[-1].isspace()
