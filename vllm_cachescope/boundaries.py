"""Where in a prompt's tokens a part of the request ends.

A token may be shared as widely as a part only if it is a function of that part and what precedes
it. Rendering and tokenising the request with everything after the part removed gives such a
function; the tokens it has in common with the real prompt, from the start, are that safe prefix,
whatever the chat template does.
"""

import re
from collections.abc import Mapping, Sequence


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many leading elements two strings or lists share.

    A binary search by slices: the comparing is done by the interpreter, not in a loop.
    """
    low, high = 0, min(len(a), len(b))
    if a == b[: len(a)]:
        return len(a)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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

    def last_within(self, text: str, end: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Find the last special token that lies wholly in the first ``end`` characters.

        Args:
            text: the prompt's text.
            end: how many of its characters to look at.
            tokens: the whole text's token ids.

        Returns:
            ``(character, token)``: the positions at which it starts; None if there is none, or
            if text and tokens do not tell the same story (a multimodal prompt, say).
        """
        if self._pattern is None:
            return None
        matches = list(self._pattern.finditer(text))
        positions = [i for i, token in enumerate(tokens) if token in self._id_set]
        # A tokenizer may put special tokens of its own in front: they are in no text.
        added = len(positions) - len(matches)
        if added < 0 or positions[:added] != list(range(added)):
            return None
        inside = sum(match.end() <= end for match in matches)
        if inside == 0:
            return None
        match, position = matches[inside - 1], positions[added + inside - 1]
        if tokens[position] != self._ids[match.group()]:
            return None
        return match.start(), position
