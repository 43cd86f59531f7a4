"""What is remembered of sessions: what came first in each, by which later requests are put right.

It is kept within bounds and for a time. No organisation finds what another has put in: everything
is kept by organisation and session.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from threading import Lock
from typing import Any
from weakref import WeakSet

from vllm_cachescope.repair.numbers import numbers_of
from vllm_cachescope.repair.session_firsts import MAX_ARRANGEMENTS, SessionFirsts, told_firsts
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account

MAX_TOOLS = 1024
"""Tools of a session whose order is remembered."""

MAX_FORMS = 8192
"""Spellings of tools and inputs of a session."""

MAX_VALUES = 256
"""Other first values of a session."""

PARAMETERS = "chat_template_kwargs"
"""What the names of parameters' values begin with."""

HEAD = "head "
"""What the names of heads' values begin with."""

REFUSED = "refused"
"""The value of a session of which nothing is put right any more."""

_ENTRY = 160  # bytes that an entry of a dictionary takes besides its text


@dataclass(frozen=True, slots=True)
class SessionState:
    """What came first in a session.

    Attributes:
        rank: the tools' identities, with the place in the order in which they came.
        forms: by the digest of what something says in any spelling, that of its first spelling.
        firsts: the digests of the first spellings.
        values: the first values of other things, by what they are of.
        arrangements: how first spellings are arranged, as far as numbers tell, by the keys of
            ``forms``: those from here and those that another replica has told of.
        heads: the numbers of first heads that another replica has told of, by what they are of.
        at: when the session was used last, in seconds.
    """

    rank: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[bytes, bytes] = field(default_factory=dict)
    firsts: frozenset[bytes] = frozenset()
    values: Mapping[str, bytes] = field(default_factory=dict)
    arrangements: Mapping[bytes, bytes] = field(default_factory=dict)
    heads: Mapping[str, bytes] = field(default_factory=dict)
    at: float = 0.0

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        texts = sum(map(len, self.rank)) + sum(map(len, self.values.values()))
        told = sum(map(len, self.arrangements.values())) + sum(map(len, self.heads.values()))
        entries = len(self.rank) + 2 * len(self.forms) + len(self.values) + 4
        return texts + told + _ENTRY * (entries + len(self.arrangements) + len(self.heads))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Lessons:
    """What a request teaches of its session, should it be its first to say so.

    Attributes:
        caller: whose session it is.
        tools: the identities of its tools, in order.
        forms: as `SessionState.forms`.
        texts: the first spellings by digest.
        values: as `SessionState.values`.
        arrangements: as `SessionState.arrangements`.
        is_void: whether the session was purged meanwhile.
    """

    caller: Caller
    tools: list[str] = field(default_factory=list)
    forms: dict[bytes, bytes] = field(default_factory=dict)
    texts: dict[bytes, bytes] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    arrangements: dict[bytes, bytes] = field(default_factory=dict)
    is_void: bool = False

    def refuse(self) -> None:
        """Have it remembered that the server refuses what is put right in the session."""
        self.values[REFUSED] = b"1"


@dataclass(frozen=True, slots=True)
class _Text:
    data: bytes
    at: float

    @property
    def nbytes(self) -> int:
        return len(self.data) + _ENTRY


class SessionMemory:
    """Keeps what came first in each session. Safe for threads.

    Args:
        max_bytes: memory for all sessions, in bytes; of the account with most, what was used least
            recently is dropped first.
        ttl_s: how long after its last use something is kept, in seconds.
        clock: seconds, never running backwards.
        account_of: returns who answers for an organisation.
    """

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        clock: Callable[[], float],
        account_of: AccountOf = own_account,
    ) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        nbytes = attrgetter("nbytes")
        half = max_bytes // 2
        self._states: SharedMemo[str, SessionState] = SharedMemo(half, nbytes, account_of)
        # By digest: most sessions of an organisation have the same tools.
        self._texts: SharedMemo[bytes, _Text] = SharedMemo(max_bytes - half, nbytes, account_of)
        self._under_way: WeakSet[Lessons] = WeakSet()
        self._lock = Lock()  # Of learning and purging: nothing is learned behind a purge.

    @property
    def size(self) -> int:
        """How much memory is taken, in bytes."""
        return self._states.size + self._texts.size

    def __len__(self) -> int:
        """Return how many sessions are remembered."""
        return len(self._states)

    def state(self, caller: Caller) -> SessionState:
        """Return what came first in the caller's session; an empty state if nothing is known."""
        state = self._states.get(caller.org, caller.session or "")
        if state is None or self._clock() - state.at > self._ttl_s:
            return SessionState()
        return state

    def told(self, caller: Caller) -> SessionFirsts | None:
        """Return what other replicas are to know of the caller's session; None for nothing."""
        state = self.state(caller)
        if not state.rank and not state.values and not state.arrangements:
            return None
        # Heads are text: their numbers are told. Of a session that is not repaired any more it
        # counts that it is not.
        values = {p: v for p, v in state.values.items() if p == REFUSED or p.startswith(PARAMETERS)}
        heads = dict(state.heads)
        for place, value in state.values.items():
            if place.startswith(HEAD) and (numbers := numbers_of(value.decode())) is not None:
                heads[place] = numbers
        tools = sorted(state.rank, key=state.rank.__getitem__)
        return told_firsts(tools, values, state.arrangements, heads)

    def lacks(self, caller: Caller) -> bool:
        """Whether nothing is known of the caller's session."""
        return self.state(caller) == SessionState()

    def adopt(self, caller: Caller, told: SessionFirsts) -> None:
        """Take in what another replica has told of a session of which nothing is known here."""
        with self._lock:
            if self.lacks(caller):
                rank = {name: place for place, name in enumerate(told.tools[:MAX_TOOLS])}
                values = dict(list(told.values.items())[:MAX_VALUES])
                state = SessionState(
                    rank,
                    values=values,
                    arrangements=dict(told.arrangements),
                    heads=dict(told.heads),
                    at=self._clock(),
                )
                self._states.put(caller.org, caller.session or "", state)

    def text(self, caller: Caller, digest: bytes) -> bytes | None:
        """Return a first spelling by its digest; None if it is not remembered any more."""
        now, found = self._clock(), self._texts.get(caller.org, digest)
        if found is None or now - found.at > self._ttl_s:
            return None
        if now - found.at > self._ttl_s / 8:
            self._texts.put(caller.org, digest, _Text(found.data, now))
        return zlib.decompress(found.data)

    def lessons(self, caller: Caller) -> Lessons:
        """Return the lessons of a request that begins; a purge of its session makes them void."""
        lessons = Lessons(caller)
        with self._lock:
            self._under_way.add(lessons)
        return lessons

    def learn(self, lessons: Lessons) -> None:
        """Remember what a request was the first of its session to say, and that it came."""
        with self._lock:
            if not lessons.is_void:
                self._learn(lessons)

    def _learn(self, lessons: Lessons) -> None:
        caller = lessons.caller
        now, known = self._clock(), self.state(caller)
        self._states.drop_while(lambda state: now - state.at > self._ttl_s)
        self._texts.drop_while(lambda text: now - text.at > self._ttl_s)
        rank = dict(known.rank)
        for name in lessons.tools[: max(0, MAX_TOOLS - len(rank))]:
            rank.setdefault(name, len(rank))
        forms = _more(known.forms, lessons.forms, MAX_FORMS)
        for digest in {digest for key, digest in forms.items() if key not in known.forms}:
            if digest in lessons.texts:
                packed = zlib.compress(lessons.texts[digest], 1)
                self._texts.put(caller.org, digest, _Text(packed, now))
        firsts = known.firsts if forms is known.forms else frozenset(forms.values())
        values = _more(known.values, lessons.values, MAX_VALUES)
        arrangements = _more(known.arrangements, lessons.arrangements, MAX_ARRANGEMENTS)
        state = SessionState(rank, forms, firsts, values, arrangements, known.heads, now)
        self._states.put(caller.org, caller.session or "", state)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Forget ``org``, or one session of ``org``; with None, everyone."""
        with self._lock:
            self._purge(org, session)

    def _purge(self, org: str | None, session: str | None) -> None:
        for lessons in list(self._under_way):
            caller = lessons.caller
            if org in (None, caller.org) and session in (None, caller.session):
                lessons.is_void = True
        if session is None:
            self._states.purge(org)
            self._texts.purge(org)
            return
        self._states.purge(org, lambda key, _: key == session)
        # What other sessions of the organisation say as well is theirs.
        used = {digest for state in self._states.of(org) for digest in state.firsts}
        self._texts.purge(org, lambda digest, _: digest not in used)


def _more(known: Mapping[Any, Any], new: Mapping[Any, Any], limit: int) -> Any:
    """Return ``known`` with what is new of ``new``, as far as there is room."""
    added = [(key, value) for key, value in new.items() if key not in known]
    added = added[: max(0, limit - len(known))]
    return {**known, **dict(added)} if added else known
