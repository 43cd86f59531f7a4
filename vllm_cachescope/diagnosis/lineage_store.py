"""Which earlier request a request goes on from, among the interleaved prompts of a session.

A session is a forest: the main agent's conversation, subagents with prompts of their own, titles,
forks that share a prefix. A request is compared with its nearest ancestor in that forest.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.alignment import part_hashes
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.compaction import find_compaction
from vllm_cachescope.diagnosis.comparison import compare, compare_whole
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.flapping import FlappingField, FlappingFields
from vllm_cachescope.diagnosis.part_kind import Trait
from vllm_cachescope.diagnosis.prefix_match import (
    PrefixMatch,
    diverges_alike,
    diverges_here,
    is_answer_to_less,
    is_unrelated,
    match_prefix,
    may_share,
    same_static,
)
from vllm_cachescope.diagnosis.reuse import reusable_tokens, similar_system
from vllm_cachescope.diagnosis.token_fingerprint import TokenFingerprint
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Caller

DEFAULT_TTL_S = 6 * 3600.0
DEFAULT_REQUESTS = 64
DEFAULT_ENDS = 1024
DEFAULT_ORG_BYTES = 16 * 2**20
DEFAULT_BYTES = 256 * 2**20

MAX_ID = 256
"""Characters of a response's id. Clients may choose theirs; a longer one is not remembered."""

_MAX_ALIKE = 64


class Relation(StrEnum):
    """How a request stands to its nearest ancestor."""

    FIRST = "first_request"
    NEW_LINEAGE = "new_lineage"
    CONTINUATION = "continuation"
    RETRY = "retry"
    FORK = "fork"
    COMPACTION = "compaction"
    BREAK = "break"


@dataclass(frozen=True, slots=True)
class Run:
    """How a request ran, as far as a later one needs to know that shares tokens with it.

    Attributes:
        tokens: its prompt.
        covered_tokens: leading tokens that a breakpoint covers.
        readable_tokens: leading tokens that any later request of the session may read.
        ttl_s: the longest lifetime among its blocks', in seconds.
        engine: where it ran.
        computed_at: when its prompt had been computed, on the store's clock, in seconds.
        used_at: when it was over, and with it the last use of its blocks.
    """

    tokens: TokenFingerprint
    covered_tokens: int
    readable_tokens: int
    ttl_s: int
    engine: EngineId
    computed_at: float
    used_at: float

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        return 400 + len(self.tokens.hashes)


@dataclass(frozen=True, slots=True)
class Held:
    """What an earlier request had left of a prompt's tokens.

    Attributes:
        run: how that request ran: of all that have as much of the prompt, the one that is likeliest
            to have left it where the prompt looked for it.
        shared_tokens: leading tokens that the two have in common, in whole points of both prints.
    """

    run: Run
    shared_tokens: int


@dataclass(slots=True, eq=False)
class Entry:
    """A request that is kept.

    Attributes:
        fingerprint: what is kept of it.
        lineage: number of its lineage, from 1 in each session.
        at: when it came, on the store's clock, in seconds.
        superseded: whether a later request goes on from it, changed or not. It stays a place to
            fork from, but is no longer the end of its conversation.
        continued: whether a later request goes on from it unchanged.
        response_id: the id its response got, once known.
        prompt_tokens: its length in tokens as the engine counted it, once known.
        run: how it ran, once it is over; None where it was not one prompt.
    """

    fingerprint: Fingerprint
    lineage: int
    at: float
    superseded: bool = False
    continued: bool = False
    response_id: str | None = None
    prompt_tokens: int | None = None
    run: Run | None = None

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        named = _id_bytes(self.response_id) if self.response_id is not None else 0
        return self.fingerprint.nbytes + named + (self.run.nbytes if self.run else 0)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request belongs.

    Attributes:
        relation: how it stands to ``ancestor``.
        entry: the request, as it is kept from now on.
        ancestor: the nearest earlier request; None for the first of a session.
        parent_lineage: the lineage it branched off from, if it began one.
        shared_tokens: estimated leading tokens that some earlier request of the session has too.
        missed_tokens: estimated tokens after those that would have been shared but for a change.
        changes: what differs from ``ancestor``, earliest first; nothing for a fork, whose messages
            are meant to differ.
        latch: set if the earliest change keeps changing.
        idle_s: seconds since ``ancestor`` came; None without one.
        ancestor_was: whether ``ancestor`` was superseded and continued before.
    """

    relation: Relation
    entry: Entry
    ancestor: Entry | None
    parent_lineage: int | None
    shared_tokens: int
    missed_tokens: int
    changes: tuple[Change, ...]
    latch: FlappingField | None
    idle_s: float | None
    ancestor_was: tuple[bool, bool] = (False, False)


@dataclass(slots=True)
class _Session:
    """The requests of a session.

    Attributes:
        entries: the latest requests and ends of conversations, oldest first. A new request is
            compared with all of them.
        older: ends of conversations that have not gone on for longer, oldest first. A new request
            is compared with those that open as it does.
        by_opening: the same by how they open.
        latches: its fields that keep changing.
        lineages: how many it has had.
        nbytes: what it takes, in bytes.
    """

    entries: list[Entry] = field(default_factory=list)
    older: dict[Entry, None] = field(default_factory=dict)
    by_opening: dict[bytes, list[Entry]] = field(default_factory=dict)
    latches: FlappingFields = field(default_factory=FlappingFields)
    lineages: int = 0
    nbytes: int = 0

    def __len__(self) -> int:
        return len(self.entries) + len(self.older)

    def __iter__(self) -> Iterator[Entry]:
        yield from self.older
        yield from self.entries

    def __contains__(self, entry: Entry) -> bool:
        return entry in self.older or entry in self.entries

    def near(self, fingerprint: Fingerprint) -> list[Entry]:
        """Return the requests to compare a new one with, oldest first."""
        alike = self.by_opening.get(fingerprint.opening, ())
        return [*alike[-_MAX_ALIKE:], *self.entries]

    def shelve(self, entry: Entry) -> None:
        """Move one of ``entries`` to ``older``."""
        self.entries.remove(entry)
        self.older[entry] = None
        self.by_opening.setdefault(entry.fingerprint.opening, []).append(entry)

    def remove(self, entry: Entry) -> None:
        """Remove one of its requests."""
        if entry not in self.older:
            self.entries.remove(entry)
            return
        del self.older[entry]
        alike = self.by_opening[entry.fingerprint.opening]
        alike.remove(entry)
        if not alike:
            del self.by_opening[entry.fingerprint.opening]


class LineageStore:
    """Keeps the recent requests of every session, within bounds.

    Not safe for concurrent use: call it from one thread, such as the event loop's.

    Args:
        clock: returns seconds; must not run backwards.
        ttl_s: how long after its last request a session is kept, in seconds.
        requests: how many requests of a session are compared with each new one. Those that a later
            one goes on from are the first to be dropped.
        ends: how many ends of other conversations are kept of a session besides, to go on from: a
            session may be all the traffic of clients that name none.
        org_bytes: memory for one organisation's sessions, in bytes; the least recently used
            session is dropped first.
        max_bytes: memory for all organisations together, in bytes.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        ttl_s: float = DEFAULT_TTL_S,
        requests: int = DEFAULT_REQUESTS,
        ends: int = DEFAULT_ENDS,
        org_bytes: int = DEFAULT_ORG_BYTES,
        max_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._requests = requests
        self._ends = ends
        self._org_bytes = org_bytes
        self._max_bytes = max_bytes
        self._orgs: dict[str, OrderedDict[str | None, _Session]] = {}
        # All sessions, least recently used first, with when they were last used.
        self._used: OrderedDict[tuple[str, str | None], float] = OrderedDict()
        self._by_response: dict[tuple[str, str], tuple[str | None, Entry]] = {}
        self._bytes_of: dict[str, int] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        """Return the number of requests kept."""
        return sum(len(session) for org in self._orgs.values() for session in org.values())

    def observe(self, caller: Caller, fingerprint: Fingerprint) -> Placement:
        """Place a request in its session's forest and keep it.

        Requests of an organisation that name no session share one forest, or one for each salt.
        """
        caller = _forest_of(caller, fingerprint)
        now = self._clock()
        self._expire(now)
        session = self._session(caller, now)
        chained = self._chained(caller.org, fingerprint)
        placement = _place(session, chained, now)
        self._keep(caller, session, placement.entry)
        ancestor = placement.ancestor
        if ancestor is not None and ancestor.superseded and ancestor in session.older:
            self._drop(caller.org, session, ancestor)
        return placement

    def answered(
        self,
        caller: Caller,
        entry: Entry,
        response_id: str | None = None,
        prompt_tokens: int | None = None,
        run: Run | None = None,
    ) -> None:
        """Note the id of the response to ``entry``, the prompt's length in tokens, and how it ran.

        Args:
            caller: whose request it was.
            entry: the request, from its `Placement`.
            response_id: the id a client may name it by.
            prompt_tokens: the prompt's length as the engine counted it.
            run: how it ran.
        """
        if prompt_tokens is not None:
            entry.prompt_tokens = prompt_tokens
        caller = _forest_of(caller, entry.fingerprint)
        session = self._find(caller)
        if session is None or entry not in session:
            return
        grown = 0
        if run is not None and entry.run is None:
            entry.run = run
            grown += run.nbytes
        if response_id is not None and entry.response_id is None and len(response_id) <= MAX_ID:
            entry.response_id = response_id
            self._by_response[caller.org, response_id] = (caller.session, entry)
            grown += _id_bytes(response_id)
        self._grow(caller.org, session, grown)

    def retract(self, caller: Caller, placement: Placement) -> None:
        """Forget a request that never ran: nothing can have been left to go on from."""
        caller = _forest_of(caller, placement.entry.fingerprint)
        session = self._find(caller)
        if session is None or placement.entry not in session:
            return
        self._drop(caller.org, session, placement.entry)
        if placement.ancestor is not None and placement.entry.lineage == placement.ancestor.lineage:
            placement.ancestor.superseded, placement.ancestor.continued = placement.ancestor_was

    def held(
        self, caller: Caller, entry: Entry, tokens: TokenFingerprint, engine: EngineId, began: float
    ) -> Held | None:
        """Return what the session's other requests had left of a prompt; None for nothing.

        Args:
            caller: whose prompt it is.
            entry: the prompt's own request, which does not count.
            tokens: the prompt.
            engine: where it ran.
            began: when it began, on the store's clock, in seconds.
        """
        session = self._find(_forest_of(caller, entry.fingerprint))
        best: Held | None = None
        rank: tuple[int, bool, bool, float] | None = None
        # The latest first: one of them is likely to have most, and the others are soon ruled out.
        for other in reversed(session.near(entry.fingerprint) if session else ()):
            if other is entry or (run := other.run) is None:
                continue
            shared = run.tokens.shared_tokens(tokens, best.shared_tokens if best else 0)
            here = (run.engine.rank, run.engine.epoch) == (engine.rank, engine.epoch)
            its = (shared, run.computed_at <= began, here, run.used_at)
            if shared and (rank is None or its > rank):
                best, rank = Held(run, shared), its
        return best

    def _find(self, caller: Caller) -> _Session | None:
        org = self._orgs.get(caller.org)
        return org.get(caller.session) if org else None

    def find(self, org: str, response_id: str) -> Entry | None:
        """Return the request of ``org`` that was answered with ``response_id``, if still kept.

        Another organisation's response is not found.
        """
        self._expire(self._clock())
        found = self._by_response.get((org, response_id))
        return found[1] if found else None

    def orgs(self) -> list[str]:
        """Return the organisations of which requests are kept."""
        return list(self._orgs)

    def purge(self, org: str | None, session: str | None = None) -> int:
        """Forget the requests of ``org``, or of one session of it, or all; return how many."""
        before = len(self)
        for held in list(self._used):
            if org in (None, held[0]) and session in (None, held[1]):
                self._forget(*held)
        return before - len(self)

    def _chained(self, org: str, fingerprint: Fingerprint) -> Fingerprint:
        """Complete a request that names the response it goes on from instead of repeating it."""
        if fingerprint.previous_id is None:
            return fingerprint
        found = self._by_response.get((org, fingerprint.previous_id))
        return fingerprint.after(found[1].fingerprint) if found else fingerprint

    def _session(self, caller: Caller, now: float) -> _Session:
        org = self._orgs.setdefault(caller.org, OrderedDict())
        session = org.setdefault(caller.session, _Session())
        org.move_to_end(caller.session)
        self._used[caller.org, caller.session] = now
        self._used.move_to_end((caller.org, caller.session))
        return session

    def _keep(self, caller: Caller, session: _Session, entry: Entry) -> None:
        session.entries.append(entry)
        self._grow(caller.org, session, entry.nbytes)
        if len(session.entries) > self._requests:
            superseded = next((e for e in session.entries if e.superseded), None)
            if superseded is not None:
                self._drop(caller.org, session, superseded)
            else:
                session.shelve(session.entries[0])
        if len(session.older) > self._ends:
            self._drop(caller.org, session, next(iter(session.older)))
        org = self._orgs[caller.org]
        while self._bytes_of[caller.org] > self._org_bytes and len(org) > 1:
            self._forget(caller.org, next(iter(org)))
        while self.nbytes > self._max_bytes and len(self._used) > 1:
            self._forget(*next(iter(self._used)))
        # A single session may be too large by itself; the newest request always stays.
        while self._bytes_of[caller.org] > self._org_bytes and len(session) > 1:
            self._drop(caller.org, session, next(iter(session)))

    def _expire(self, now: float) -> None:
        while self._used:
            (org, name), used = next(iter(self._used.items()))
            if used + self._ttl_s > now:
                break
            self._forget(org, name)

    def _forget(self, org: str, name: str | None) -> None:
        session = self._orgs[org].pop(name)
        del self._used[org, name]
        for entry in session:
            self._unname(org, entry)
        self._grow(org, session, -session.nbytes)
        if not self._orgs[org]:
            del self._orgs[org]
            del self._bytes_of[org]

    def _drop(self, org: str, session: _Session, entry: Entry) -> None:
        session.remove(entry)
        self._unname(org, entry)
        self._grow(org, session, -entry.nbytes)

    def _unname(self, org: str, entry: Entry) -> None:
        if entry.response_id is not None:
            found = self._by_response.get((org, entry.response_id))
            if found is not None and found[1] is entry:
                del self._by_response[org, entry.response_id]

    def _grow(self, org: str, session: _Session, nbytes: int) -> None:
        session.nbytes += nbytes
        self._bytes_of[org] = self._bytes_of.get(org, 0) + nbytes
        self.nbytes += nbytes


def _forest_of(caller: Caller, fingerprint: Fingerprint) -> Caller:
    """Return in whose forest a request stands. A salt tells clients apart that name no session:
    none can read what another has cached."""
    salt = fingerprint.params.get("cache_salt")
    if caller.session is not None or salt is None:
        return caller
    return Caller(caller.org, f"salt {salt.hex()}")


def _id_bytes(response_id: str) -> int:
    """About how much memory it takes to find a request by an id, in bytes."""
    return 200 + len(response_id)


def _place(session: _Session, new: Fingerprint, now: float) -> Placement:
    """Find the nearest ancestor of ``new`` and how it stands to it. Does not keep it yet."""
    near = session.near(new)
    nearest: Entry | None = None
    shared = PrefixMatch(0, 0, False)
    agreed = b""
    for entry in reversed(near):
        # Most agree less far than the best so far, or like it and no further.
        if not entry.fingerprint.hashes.startswith(agreed):
            continue
        if nearest and (
            diverges_here(entry.fingerprint, new, shared)
            or diverges_alike(entry.fingerprint, nearest.fingerprint, shared)
        ):
            continue
        found = match_prefix(entry.fingerprint, new)
        if nearest is None or (found.tokens, found.whole) > (shared.tokens, shared.whole):
            nearest, shared = entry, found
            agreed = new.hashes[: shared.parts * HASH_BYTES]
            if shared.whole and shared.parts == len(new):
                break  # It is the same request.
    if nearest is None:
        return _begin(session, Relation.FIRST, new, now)
    # A request that an earlier one repeats in full misses nothing.
    if shared.parts < len(new):
        parent_known = shared.whole and shared.parts >= new.parent_parts
        if (broken := _broken(near, new, shared, parent_known)) is not None:
            changes = compare(broken.fingerprint, new)
            compacted = changes[:1] and changes[0].kind is ChangeKind.HISTORY_COMPACTED
            relation = Relation.COMPACTION if compacted else Relation.BREAK
            return _go_on(session, relation, broken, new, shared.tokens, changes, now)
        if (old := _compacted(near, new, shared)) is not None:
            changes = compare(old.fingerprint, new)
            return _go_on(session, Relation.COMPACTION, old, new, shared.tokens, changes, now)
    return _relate(session, near, nearest, new, shared, now)


def _broken(
    near: Sequence[Entry], new: Fingerprint, shared: PrefixMatch, parent_known: bool
) -> Entry | None:
    """Return the conversation that ``new`` would have shared more with, had it not changed."""
    best: Entry | None = None
    most = (shared.tokens, 0)
    beyond = range(shared.parts, len(new))
    messages = part_hashes(new, range(new.static_parts, len(new)))
    static, known = new.static_hashes, frozenset(messages)
    opening = new.is_opening
    for entry in reversed(near):
        # Without an answer in it, it can only be the same question, asked with a change.
        if opening and entry.fingerprint.message_hashes != new.message_hashes:
            continue
        if entry.superseded or is_unrelated(entry.fingerprint, static, known):
            continue
        # With its parent known, only what came after that can have been in another one as well.
        if parent_known and not may_share(entry.fingerprint, new, beyond):
            continue
        found = match_prefix(entry.fingerprint, new)
        # Nor is that a loss where it was a side call's, under a prompt of its own.
        if parent_known and not same_static(entry.fingerprint, new, found):
            continue
        could = reusable_tokens(entry.fingerprint, new, found, parent_known, messages)
        if could > shared.tokens and (could, found.tokens) > most:
            best, most = entry, (could, found.tokens)
    return best


def _compacted(near: Sequence[Entry], new: Fingerprint, shared: PrefixMatch) -> Entry | None:
    """Return the conversation that ``new`` begins anew from a summary.

    A summary does not say of which conversation; the longest is the likeliest to be compacted.
    """
    beyond = range(shared.parts, len(new))
    declared = any(new.has(part, Trait.COMPACTION) for part in beyond)
    if not declared and not new.is_opening:
        return None
    compacted = [
        entry
        for entry in reversed(near)
        if not entry.superseded
        and (declared or not entry.fingerprint.is_opening)
        and find_compaction(entry.fingerprint, new) is not None
    ]
    return max(compacted, key=lambda entry: entry.fingerprint.tokens, default=None)


def _relate(
    session: _Session,
    near: Sequence[Entry],
    nearest: Entry,
    new: Fingerprint,
    shared: PrefixMatch,
    now: float,
) -> Placement:
    """Place a request that misses nothing an earlier one could have left it."""
    old, static = nearest.fingerprint, new.static_parts
    if shared.whole and shared.tokens:
        changes = compare_whole(old, new)
        if (kept := _still_cached(old, new, shared.tokens, changes)) < shared.tokens:
            return _go_on(session, Relation.BREAK, nearest, new, kept, changes, now)
        same = len(new) == shared.parts
        relation = Relation.RETRY if same else Relation.CONTINUATION
        if not nearest.continued:
            return _go_on(session, relation, nearest, new, shared.tokens, changes, now)
        # The conversation went on from there; this is another branch of it.
        branch = Relation.RETRY if same else Relation.FORK
        return _begin(session, branch, new, now, nearest, shared.tokens)
    elif same_static(old, new, shared) and is_answer_to_less(old, new, shared):
        return _go_on(session, Relation.CONTINUATION, nearest, new, shared.tokens, (), now)
    beyond = shared.tokens > new.start(static) or shared.parts == len(new) > 0
    if same_static(old, new, shared) and beyond:
        return _begin(session, Relation.FORK, new, now, nearest, shared.tokens)
    twin = _twin(near, new)
    if twin is None:
        return _begin(session, Relation.NEW_LINEAGE, new, now, nearest, shared.tokens)
    changes = tuple(
        change
        for change in compare(twin.fingerprint, new)
        if change.area not in ("messages", "markers") and change.diverges
    )
    could = min(new.start(static), twin.fingerprint.start(twin.fingerprint.static_parts))
    missed = max(0, could - shared.tokens) if changes else 0
    return _begin(
        session,
        Relation.NEW_LINEAGE,
        new,
        now,
        twin if missed else nearest,
        shared.tokens,
        changes if missed else (),
        missed,
    )


def _still_cached(
    old: Fingerprint, new: Fingerprint, shared: int, changes: tuple[Change, ...]
) -> int:
    """Return how many of the shared tokens the breakpoints let ``new`` find and keep."""
    kept = shared
    for change in changes:
        if change.kind is ChangeKind.SCOPE_CHANGED:
            kept = min(kept, change.token)
        elif change.kind is ChangeKind.MARK_REMOVED and old.covered_tokens > new.covered_tokens:
            kept = min(kept, new.covered_tokens)
    return kept


def _twin(near: Sequence[Entry], new: Fingerprint) -> Entry | None:
    """Return a request of another conversation whose tools and system are nearly the same."""
    names = {tool.name for tool in new.tools}
    for entry in reversed(near):
        old = entry.fingerprint
        if (
            old.model == new.model
            and old.counts[Region.SYSTEM] == new.counts[Region.SYSTEM]
            and {tool.name for tool in old.tools} == names
            and new.static_parts
            and similar_system(old, new)
        ):
            return entry
    return None


def _go_on(
    session: _Session,
    relation: Relation,
    ancestor: Entry,
    new: Fingerprint,
    shared_tokens: int,
    changes: tuple[Change, ...],
    now: float,
) -> Placement:
    """Place ``new`` in the lineage of ``ancestor``."""
    was = (ancestor.superseded, ancestor.continued)
    # A conversation that was compacted by its looks alone may still go on.
    ancestor.superseded = relation is not Relation.COMPACTION or ancestor.superseded
    ancestor.continued |= relation in (Relation.CONTINUATION, Relation.RETRY)
    missed, latch = 0, None
    if relation in (Relation.BREAK, Relation.COMPACTION):
        missed = max(0, min(ancestor.fingerprint.tokens, new.tokens) - shared_tokens)
    if relation is Relation.BREAK and changes:
        latch = session.latches.note(ancestor.lineage, changes[0], missed)
    return Placement(
        relation,
        Entry(new, ancestor.lineage, now),
        ancestor,
        None,
        shared_tokens,
        missed,
        changes,
        latch,
        now - ancestor.at,
        was,
    )


def _begin(
    session: _Session,
    relation: Relation,
    new: Fingerprint,
    now: float,
    ancestor: Entry | None = None,
    shared_tokens: int = 0,
    changes: tuple[Change, ...] = (),
    missed_tokens: int = 0,
) -> Placement:
    """Place ``new`` at the start of a lineage of its own."""
    session.lineages += 1
    branches = relation in (Relation.FORK, Relation.RETRY)
    return Placement(
        relation,
        Entry(new, session.lineages, now),
        ancestor,
        ancestor.lineage if branches and ancestor is not None else None,
        shared_tokens,
        missed_tokens,
        changes,
        None,
        None if ancestor is None else now - ancestor.at,
    )
