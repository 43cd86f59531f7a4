"""Boundaries: the tokens of a prompt at which the parts of its request end.

A token may be shared as widely as a part only if it depends on nothing after that part. To find
these tokens the request is rendered and tokenised once more, with everything after the part left
out. The tokens that this shorter prompt and the real one have in common, from the start, depend on
nothing after the part, whatever the chat template does.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_CLOSING = 64  # elements at the end of a shortened rendering that close its template


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many leading elements two strings or lists share.

    A binary search over slices: the interpreter compares them faster than a loop would.
    """
    low, high = 0, min(len(a), len(b))
    # Two renderings usually differ near the end of the shorter one, in what closes its template.
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
        start: where it starts in the prompt's text, in characters.
        end: just past its last character.
        token: its position in the prompt's tokens.
    """

    start: int
    end: int
    token: int


class SpecialTokens:
    """The tokens a tokenizer cuts out of the text before anything else.

    Text on one side of a special token has no influence on the tokens of the other side. So the
    tokens of a prompt's beginning, up to such a token, are known without tokenising it again.

    Args:
        ids: token ids by their text.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        self._id_array = np.array(sorted(ids.values()), dtype=np.int64)
        # Longest first: tokenizers take the longest special token that matches.
        texts = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def matches(self, text: str) -> Iterator[tuple[re.Match[str], int]]:
        """Yield where the special tokens are in a text, in order, each with its id."""
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                yield match, self._ids[match.group()]

    def positions(self, tokens: Sequence[int]) -> list[int]:
        """Return where the special tokens are among ``tokens``, quickest where these are an
        array."""
        found: list[int] = np.flatnonzero(np.isin(np.asarray(tokens), self._id_array)).tolist()
        return found

    def landmarks(self, text: str, tokens: Sequence[int]) -> list[Landmark]:
        """Return the special tokens of a prompt, in order.

        The list is empty if text and tokens do not hold the same special tokens, as in a
        multimodal prompt.

        Args:
            text: the prompt's text.
            tokens: the prompt's token ids.
        """
        matches = list(self.matches(text))
        positions = self.positions(tokens)
        # A tokenizer may put special tokens of its own in front; these are not in the text.
        added = len(positions) - len(matches)
        if added < 0 or positions[:added] != list(range(added)):
            return []
        found = [
            Landmark(match.start(), match.end(), position)
            for (match, _), position in zip(matches, positions[added:], strict=True)
        ]
        same = all(tokens[at.token] == id_ for (_, id_), at in zip(matches, found, strict=True))
        return found if same else []


def last_within(landmarks: Sequence[Landmark], end: int) -> Landmark | None:
    """Return the last of ``landmarks`` that lies wholly in a text's first ``end`` characters."""
    inside = bisect_right(landmarks, end, key=lambda landmark: landmark.end)
    return landmarks[inside - 1] if inside else None
