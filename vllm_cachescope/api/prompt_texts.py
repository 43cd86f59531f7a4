"""The texts of tools and system blocks, redacted: the one place that keeps prompt text."""

import sys
from collections.abc import Callable, Iterable
from operator import itemgetter

from cachetools import TTLCache

from vllm_cachescope.api.redaction import Redaction, readable_text
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.lineage_store import DEFAULT_TTL_S
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.tenancy.scope import Caller

KEPT_BYTES = 64 * 2**20
"""Memory for texts, of all organisations together, in bytes."""

ENTRY_BYTES = 480
"""Memory that a text takes besides itself and its session's name, in bytes: its key with the hash,
its size, and its place in the cache's tables."""

MAX_NEW_CHARACTERS = 2**18
"""What the new texts of one request may cost to keep, in characters (see `readable_text`). A text
that is left out is kept with the next request that has it."""

_Key = tuple[str, str | None, bytes]


class PromptTexts:
    """Texts by their caller and the hash in their request's fingerprint.

    A text is kept as long as a session is, from its last use on, unless memory is short.

    Args:
        rules: patterns of what is secret, besides the built-in ones.
        clock: seconds, never running backwards.
    """

    def __init__(self, rules: Iterable[str], clock: Callable[[], float]) -> None:
        self._redaction = Redaction(rules)
        # Each with about how much memory it takes, in bytes.
        self._texts: TTLCache[_Key, tuple[str, int]] = TTLCache(
            KEPT_BYTES, DEFAULT_TTL_S, clock, itemgetter(1)
        )

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """About how much memory the texts take, in bytes. A session's name is counted with each
        of its texts."""
        return int(self._texts.currsize)

    def keep(self, caller: Caller, request: PromptRequest, fingerprint: Fingerprint) -> None:
        """Keep the texts of a request's tools and system blocks.

        Args:
            caller: whose they are.
            request: the request.
            fingerprint: its fingerprint, by whose hashes the texts are found again.
        """
        self._texts.expire()
        by_path = {part.path: part for part in request.parts if part.region < Region.MESSAGES}
        paths = fingerprint.paths.split("\n", fingerprint.static_parts)
        left = MAX_NEW_CHARACTERS
        for i, path in enumerate(paths[: fingerprint.static_parts]):
            key = (caller.org, caller.session, fingerprint.hash(i))
            if (known := self._texts.get(key)) is not None:
                self._texts[key] = known  # It lives on from now.
            elif left > 0 and (part := by_path.get(path)) is not None:
                text, cost = readable_text(part.content)
                left -= cost
                if left >= 0:
                    text = self._redaction.redact(text)
                    self._texts[key] = text, _nbytes(key, text)

    def find(self, caller: Caller, hashes: bytes) -> str | None:
        """Return the texts of ``caller`` that have these ``hashes``, one after another; None if
        one of them is not kept."""
        texts = []
        for at in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
            key = (caller.org, caller.session, hashes[at : at + HASH_BYTES])
            if (known := self._texts.get(key)) is None:
                return None
            texts.append(known[0])
        return "\n".join(texts)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the texts of ``org``, or of one session of ``org``; with None, of everyone."""
        self._texts.expire()
        for key in list(self._texts):
            if org in (None, key[0]) and session in (None, key[1]):
                self._texts.pop(key, None)


def _nbytes(key: _Key, text: str) -> int:
    return ENTRY_BYTES + sys.getsizeof(key[1]) + sys.getsizeof(text)
