"""Where in a prompt's tokens a part of the request ends.

A token may be shared as widely as a part only if it is a function of that part and what precedes
it. Rendering and tokenising the request with everything after the part removed gives such a
function; the tokens it has in common with the real prompt, from the start, are that safe prefix,
whatever the chat template does.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_CLOSING = 64  # elements of a rendering that may come of its having been cut off


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many leading elements two strings or lists share.

    A binary search by slices: the comparing is done by the interpreter, not in a loop.
    """
    low, high = 0, min(len(a), len(b))
    # Renderings that part do so near the end of the shorter one: with what closes a template.
    near = max(0, high - _CLOSING)
    if a[:near] == b[:near]:
        low = near
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Landmark(NamedTuple):
    """A special token in a prompt.

    Attributes:
        start: the character of the prompt's text at which it starts.
        end: the character after it.
        token: its position in the prompt's tokens.
    """

    start: int
    end: int
    token: int


class SpecialTokens:
    """The tokens a tokenizer cuts out of the text before anything else.

    Text on one side of such a token has no influence on the tokens of the other side, so a long
    text need not be tokenised again to know the tokens of its beginning.

    Args:
        ids: token ids by their text.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        self._id_set = frozenset(ids.values())
        # Longest first: tokenizers take the longest special token that matches.
        texts = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def landmarks(self, text: str, tokens: Sequence[int]) -> list[Landmark]:
        """Find the special tokens of a prompt, in order.

        Args:
            text: the prompt's text.
            tokens: its token ids.

        Returns:
            None of them if text and tokens do not tell the same story (a multimodal prompt, say).
        """
        if self._pattern is None:
            return []
        matches = list(self._pattern.finditer(text))
        id_set = self._id_set
        positions = [i for i, token in enumerate(tokens) if token in id_set]
        # A tokenizer may put special tokens of its own in front: they are in no text.
        added = len(positions) - len(matches)
        if added < 0 or positions[:added] != list(range(added)):
            return []
        found = [
            Landmark(match.start(), match.end(), position)
            for match, position in zip(matches, positions[added:], strict=True)
        ]
        same = all(
            tokens[at.token] == self._ids[match.group()]
            for match, at in zip(matches, found, strict=True)
        )
        return found if same else []


def last_within(landmarks: Sequence[Landmark], end: int) -> Landmark | None:
    """Return the last of ``landmarks`` that lies wholly in a text's first ``end`` characters."""
    inside = bisect_right(landmarks, end, key=lambda landmark: landmark.end)
    return landmarks[inside - 1] if inside else None
