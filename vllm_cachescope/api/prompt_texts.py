"""The texts of tools and system blocks, redacted: the one place that keeps prompt text."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

from vllm_cachescope.api.redaction import Redaction, readable_text
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.lineage_store import DEFAULT_TTL_S
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account

KEPT_BYTES = 64 * 2**20
"""Memory for texts, of all organisations together, in bytes."""

ENTRY_BYTES = 300
"""Memory that a text takes besides itself and its session's name, in bytes: its key with the hash,
its size and last use, and its place in the memo."""

MAX_NEW_CHARACTERS = 2**18
"""What the new texts of one request may cost to keep, in characters (see `readable_text`). A text
that is left out is kept with the next request that has it."""

_Key = tuple[str | None, bytes]  # a session, and a hash


@dataclass(frozen=True, slots=True)
class _Text:
    """A text, about how much memory it takes in bytes, and when it was last used."""

    text: str
    nbytes: int
    used_at: float


class PromptTexts:
    """Texts by their caller and the hash in their request's fingerprint.

    A text is kept as long as a session is, from its last use on, unless memory is short: then the
    account that holds most gives way.

    Args:
        rules: patterns of what is secret, besides the built-in ones.
        clock: seconds, never running backwards.
        account_of: returns who answers for an organisation, by its id.
    """

    def __init__(
        self,
        rules: Iterable[str],
        clock: Callable[[], float],
        account_of: AccountOf = own_account,
    ) -> None:
        self._redaction = Redaction(rules)
        self._clock = clock
        self._texts: SharedMemo[_Key, _Text] = SharedMemo(
            KEPT_BYTES, attrgetter("nbytes"), account_of
        )

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """About how much memory the texts take, in bytes. A session's name is counted with each
        of its texts."""
        return self._texts.size

    def keep(self, caller: Caller, request: PromptRequest, fingerprint: Fingerprint) -> None:
        """Keep the texts of a request's tools and system blocks.

        Args:
            caller: whose they are.
            request: the request.
            fingerprint: its fingerprint, by whose hashes the texts are found again.
        """
        self._expire()
        by_path = {part.path: part for part in request.parts if part.region < Region.MESSAGES}
        paths = fingerprint.paths.split("\n", fingerprint.static_parts)
        left = MAX_NEW_CHARACTERS
        for i, path in enumerate(paths[: fingerprint.static_parts]):
            key = caller.session, fingerprint.hash(i)
            if self._use(caller.org, key) is None and left > 0 and (part := by_path.get(path)):
                text, cost = readable_text(part.content)
                left -= cost
                if left >= 0:
                    text = self._redaction.redact(text)
                    kept = _Text(text, _nbytes(key, text), self._clock())
                    self._texts.put(caller.org, key, kept)

    def find(self, caller: Caller, hashes: bytes) -> str | None:
        """Return the texts of ``caller`` that have these ``hashes``, one after another; None if
        one of them is not kept."""
        self._expire()
        texts = []
        for at in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
            text = self._use(caller.org, (caller.session, hashes[at : at + HASH_BYTES]))
            if text is None:
                return None
            texts.append(text)
        return "\n".join(texts)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the texts of ``org``, or of one session of ``org``; with None, of everyone."""
        self._texts.purge(org, lambda key, _: session in (None, key[0]))

    def _use(self, org: str, key: _Key) -> str | None:
        """Return a text, which lives on from now; None if it is not kept."""
        if (known := self._texts.get(org, key)) is None:
            return None
        self._texts.put(org, key, replace(known, used_at=self._clock()))
        return known.text

    def _expire(self) -> None:
        expired = self._clock() - DEFAULT_TTL_S
        self._texts.drop_while(lambda kept: kept.used_at <= expired)


def _nbytes(key: _Key, text: str) -> int:
    return ENTRY_BYTES + sys.getsizeof(key[0]) + sys.getsizeof(text)
