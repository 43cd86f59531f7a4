"""The known tokens of recent prompts, from which a prompt that begins alike goes on.

An agent's prompt is the one before and some more. To tokenise 100,000 tokens takes a tenth of a
second, and all but the last thousand were tokenised a moment ago. A tokenizer cuts its special
tokens out of a text before anything else, and what is on one side of one has no influence on the
tokens of the other: from there on a text can be tokenised by itself.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from hashlib import sha256
from weakref import ref

from vllm_cachescope.prompt.boundaries import SpecialTokens
from vllm_cachescope.prompt.token_array import token_array
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account

KEPT_S = 3600.0
"""How long the tokens of a prompt are kept, in seconds."""

MAX_CUTS = 1024
"""Of a prompt with more special tokens than that the last ones are looked at."""

_ENTRY_BYTES = 400
"""Memory that one cut of a prompt takes besides its tokens, in bytes."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a text may be cut: in front of each of its special tokens.

    Attributes:
        ids: the special tokens, in order.
        starts: where they start, in characters.
        hashes: for each, the hash of the text in front of it.
    """

    ids: Sequence[int]
    starts: Sequence[int]
    hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of a text whose tokens are known.

    Attributes:
        cut: the number of the cut that it ends at.
        tokens: its tokens.
    """

    cut: int
    tokens: "array[int]"


@dataclass(frozen=True, slots=True)
class _Known:
    """The tokens in front of a cut.

    Attributes:
        tokens: returns the prompt's tokens, which its last cut keeps; None if that is gone.
        count: how many of them are in front of this cut.
        nbytes: about how much memory it takes, in bytes.
        kept_at: when it was kept, in seconds.
    """

    tokens: Callable[[], "array[int] | None"]
    count: int
    nbytes: int
    kept_at: float


class KnownTokens:
    """Remembers the tokens of prompts up to some of their special tokens.

    What is kept for some readers serves no others: how long a prompt takes tells them nothing.
    Texts are remembered by their hashes alone. Safe for threads.

    Args:
        special: the special tokens that a tokenizer finds in a text as it came.
        odd: ids of those at which a text may not be cut: they look at what is in front of them.
        limit: memory for the tokens of all organisations, in bytes; 4 bytes each.
        account_of: returns who answers for an organisation, by its id.
        clock: seconds, never running backwards.
    """

    def __init__(
        self,
        special: SpecialTokens,
        odd: Container[int] = frozenset(),
        *,
        limit: int,
        account_of: AccountOf = own_account,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._special = special
        self._odd = odd
        self._known: SharedMemo[tuple[str | None, bytes], _Known] = SharedMemo(
            limit, lambda known: known.nbytes, account_of
        )

    @property
    def nbytes(self) -> int:
        """About how much memory the tokens take, in bytes."""
        return self._known.size

    def cuts(self, text: str) -> Cuts:
        """Return where a text may be cut."""
        matches = (one for one in self._special.matches(text) if one[1] not in self._odd)
        found = deque(matches, MAX_CUTS)
        state, hashes, done = sha256(), [], 0
        for match, _ in found:
            start = match.start()
            state.update(text[done:start].encode("utf-8", "surrogatepass"))
            hashes.append(state.copy().digest())
            done = start
        return Cuts([id_ for _, id_ in found], [match.start() for match, _ in found], hashes)

    def find(self, readers: Caller, cuts: Cuts) -> Beginning | None:
        """Return the longest beginning of a text whose tokens are known; None if there is none.

        Args:
            readers: who may find it, the sender among them.
            cuts: those of the text.
        """
        self._drop_old()
        for cut in range(len(cuts.hashes) - 1, -1, -1):
            known = self._known.get(readers.org, (readers.session, cuts.hashes[cut]))
            if known is not None and (tokens := known.tokens()) is not None:
                return Beginning(cut, tokens[: known.count])
        return None

    def keep(
        self,
        readers: Caller,
        cuts: Cuts,
        rest: Sequence[int],
        beginning: Beginning | None = None,
    ) -> None:
        """Remember the tokens of a text, up to its last special token and to some before.

        Args:
            readers: who may find them: an organisation, or one session of it.
            cuts: those of the text.
            rest: its tokens behind ``beginning``.
            beginning: what was known of it; None for nothing.
        """
        known = array("I") if beginning is None else beginning.tokens
        first = 0 if beginning is None else beginning.cut
        wanted = _spread(first + (beginning is not None), len(cuts.hashes))
        if not wanted:
            return
        tokens = known + token_array(rest)
        places = self._places(tokens, len(known), cuts.ids[first:])
        if places is None:
            return
        now, held = self._clock(), ref(tokens)
        for cut in reversed(wanted):
            known_here = _Known(held, places[cut - first], _ENTRY_BYTES, now)
            if cut == wanted[0]:
                nbytes = _ENTRY_BYTES + tokens.itemsize * len(tokens)
                known_here = _Known(lambda: tokens, known_here.count, nbytes, now)
            self._known.put(readers.org, (readers.session, cuts.hashes[cut]), known_here)

    def purge(self, org: str | None = None, session: str | None = None) -> None:
        """Drop what is remembered of ``org``, or of one session of ``org``; with None, of all."""
        self._known.purge(org, lambda key, _: session in (None, key[0]))

    def _drop_old(self) -> None:
        oldest = self._clock() - KEPT_S
        self._known.drop_while(lambda known: known.kept_at < oldest)

    def _places(self, tokens: "array[int]", start: int, ids: Sequence[int]) -> list[int] | None:
        """Return where special tokens stand among ``tokens``, from ``start`` on; None if these are
        not the ``ids`` that the text has at its end, in this order: then a tokenizer does something
        else with them."""
        found = self._special.positions(tokens[start:])
        places = [start + place for place in found if tokens[start + place] not in self._odd]
        del places[: max(0, len(places) - len(ids))]
        return places if [tokens[place] for place in places] == list(ids) else None


def _spread(start: int, end: int) -> list[int]:
    """Return some numbers from ``start`` up to ``end``: the last one and those that are 1, 3, 7, 15
    and so on before it. Chat templates render the last turns anew, by what follows."""
    found, back = [], 1
    while end - back >= start:
        found.append(end - back)
        back *= 2
    return found
