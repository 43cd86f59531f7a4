"""The recent requests of every session, among which each new one finds its place."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from secrets import token_bytes

from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.forest import Forest, LineageNode, id_bytes
from vllm_cachescope.diagnosis.placement import LineagePlacement, place
from vllm_cachescope.diagnosis.session_note import NoteKey, SessionNote
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, Shares, own_account

_Session = tuple[str, str | None]  # organisation and session
Noted = tuple[NoteKey, SessionNote]
"""A note, and where it stands."""

DEFAULT_TTL_S = 6 * 3600.0
DEFAULT_REQUESTS = 64
DEFAULT_ENDS = 1024
DEFAULT_ORG_BYTES = 16 * 2**20
DEFAULT_BYTES = 256 * 2**20

MAX_ID = 256
"""Characters of a response's id. Clients may choose ids; a longer one is not remembered."""


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
        max_bytes: memory for all organisations together, in bytes; of the account with most the
            least recently used session is dropped first.
        account_of: returns who answers for an organisation, by its id.
        wall_clock: Unix time in seconds, about the same on all replicas.
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
        account_of: AccountOf = own_account,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._ttl_s = ttl_s
        self._requests = requests
        self._ends = ends
        self._org_bytes = org_bytes
        self._max_bytes = max_bytes
        self._account_of = account_of
        self._shares = Shares()
        self._orgs: dict[str, OrderedDict[str | None, Forest]] = {}
        # All sessions, least recently used first, with when they were last used; and those of each
        # account in the same order.
        self._used: OrderedDict[_Session, float] = OrderedDict()
        self._used_by: dict[str, OrderedDict[_Session, None]] = {}
        self._by_response: dict[tuple[str, str], LineageNode] = {}
        self._bytes_of: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """About how much memory the requests take, in bytes."""
        return self._shares.total

    def __len__(self) -> int:
        """Return the number of requests kept."""
        return sum(len(forest) for org in self._orgs.values() for forest in org.values())

    def observe(self, caller: Caller, fingerprint: Fingerprint) -> LineagePlacement:
        """Place a request in its session's forest and keep it.

        Requests of an organisation that name no session share one forest, or one for each salt.
        """
        caller = _forest_owner(caller, fingerprint)
        now = self._clock()
        self._expire(now)
        forest = self._open_forest(caller, now)
        placement = place(forest, self._chained(caller.org, fingerprint), now)
        self._keep(caller, forest, placement.node)
        ancestor = placement.ancestor
        if ancestor is not None and ancestor.superseded and ancestor in forest.older:
            self._drop(caller.org, forest, ancestor)
        return placement

    def lacks(self, caller: Caller, fingerprint: Fingerprint) -> NoteKey | None:
        """Return where there may be notes of other replicas on the request that a new one goes on
        from; None if that is known here, or nowhere."""
        owner = _forest_owner(caller, fingerprint)
        forest = self._find_forest(owner)
        if fingerprint.previous_id is not None:
            known = (owner.org, fingerprint.previous_id) in self._by_response
        else:
            known = False
            if forest is not None and len(forest) > 0:
                known = forest.knows_parent_of(fingerprint)
        return None if known else _note_key(owner, fingerprint)

    def merge(self, caller: Caller, fingerprint: Fingerprint, notes: Iterable[SessionNote]) -> None:
        """Take in what other replicas have noted.

        Args:
            caller: whose request has asked for it.
            fingerprint: that request.
            notes: the notes; those that are known already are passed over.
        """
        caller = _forest_owner(caller, fingerprint)
        notes = list(notes)
        if not notes:
            return
        forest = self._open_forest(caller, self._clock())
        known = {node.name: node for node in forest if node.name}
        for note in notes:
            if note.node.name not in known:
                known[note.node.name] = note.node
                note.node.parent = note.ancestor
                forest.merge(note.node)
                if note.node.response_id is not None:
                    self._by_response[caller.org, note.node.response_id] = note.node
                self._grow(caller.org, forest, note.node.nbytes)
        for note in notes:
            forest.flapping.merge(note.node.lineage, note.flapping)
            if (ancestor := known.get(note.ancestor)) is not None:
                ancestor.superseded |= note.supersedes
                ancestor.continued |= note.continues
        self._shrink(caller, forest)

    def note(self, caller: Caller, placement: LineagePlacement) -> Noted | None:
        """Return what other replicas are to know of a request that was answered, and under which
        key; None if nothing can be known of it there."""
        node, ancestor = placement.node, placement.ancestor
        owner = _forest_owner(caller, node.fingerprint)
        forest, key = self._find_forest(owner), _note_key(owner, node.fingerprint)
        if key is None or forest is None or node not in forest:
            return None
        if not node.name:
            # Names are in the order of their requests, on whatever replica.
            at_ms = int(self._wall_clock() * 1000)
            node.name = at_ms.to_bytes(8, "big") + token_bytes(8)
        flapping = forest.flapping.of(node.lineage)
        if ancestor is None or not ancestor.name:
            return key, SessionNote(node, flapping=flapping)
        node.parent = ancestor.name
        obsolete = ancestor.parent if ancestor.superseded else b""
        return key, SessionNote(
            node, ancestor.name, ancestor.superseded, ancestor.continued, obsolete, flapping
        )

    def answered(
        self,
        caller: Caller,
        node: LineageNode,
        response_id: str | None = None,
        prompt_tokens: int | None = None,
        computed: tuple[ComputedPrompt, ...] = (),
    ) -> None:
        """Note what became of a request, once it is over.

        Args:
            caller: whose request it was.
            node: the request, from its `LineagePlacement`.
            response_id: the id of its response, by which a client may name it.
            prompt_tokens: the prompt's length in tokens as the engine counted it.
            computed: its prompts as the engine computed them.
        """
        if prompt_tokens is not None:
            node.prompt_tokens = prompt_tokens
        caller = _forest_owner(caller, node.fingerprint)
        forest = self._find_forest(caller)
        if forest is None or node not in forest:
            return
        grown = 0
        if not node.computed:
            node.computed = computed
            grown += sum(prompt.nbytes for prompt in computed)
        if response_id is not None and node.response_id is None and len(response_id) <= MAX_ID:
            node.response_id = response_id
            self._by_response[caller.org, response_id] = node
            grown += id_bytes(response_id)
        self._grow(caller.org, forest, grown)

    def ended(self, caller: Caller, node: LineageNode, lines: frozenset[bytes]) -> list[str]:
        """Return the nonces of the prompts that nothing goes on from: of other conversations of the
        session whose last answer a request carries. Each is told once.

        Args:
            caller: whose request it is.
            node: the request.
            lines: its `carried_lines`.
        """
        nonces: list[str] = []
        for other in self._answered(caller, node):
            if lines.issuperset(other.answer):
                other.answer = ()
                nonces += other.nonces
        return nonces

    def awaits(self, caller: Caller, node: LineageNode) -> bool:
        """Whether a request may carry the answer of another conversation of its session."""
        return any(True for _ in self._answered(caller, node))

    def drop(self, caller: Caller, placement: LineagePlacement) -> None:
        """Drop a request that never ran, such as one the server refused: it left nothing to go on
        from."""
        caller = _forest_owner(caller, placement.node.fingerprint)
        forest = self._find_forest(caller)
        if forest is None or placement.node not in forest:
            return
        self._drop(caller.org, forest, placement.node)
        if placement.ancestor is not None and placement.node.lineage == placement.ancestor.lineage:
            placement.ancestor.superseded, placement.ancestor.continued = placement.ancestor_was

    def earlier_prompts(self, caller: Caller, node: LineageNode) -> Iterator[ComputedPrompt]:
        """Yield the prompts of the session's other requests that were computed, the latest first.

        Args:
            caller: whose session it is.
            node: the request whose prompts do not count.
        """
        forest = self._find_forest(_forest_owner(caller, node.fingerprint))
        for other in reversed(forest.candidates(node.fingerprint) if forest else ()):
            if other is not node:
                yield from other.computed

    def find(self, org: str, response_id: str) -> LineageNode | None:
        """Return the request of ``org`` that was answered with ``response_id``, if still kept.

        Another organisation's response is not found.
        """
        self._expire(self._clock())
        return self._by_response.get((org, response_id))

    def orgs(self) -> list[str]:
        """Return the organisations of which requests are kept."""
        return list(self._orgs)

    def purge(self, org: str | None, session: str | None = None) -> int:
        """Purge the requests of an organisation, or of one session of it, or all.

        Args:
            org: the organisation; None for all.
            session: the session; None for all.

        Returns:
            How many requests were kept of them.
        """
        before = len(self)
        for kept_org, kept_session in list(self._used):
            if org in (None, kept_org) and session in (None, kept_session):
                self._drop_forest(kept_org, kept_session)
        return before - len(self)

    def _chained(self, org: str, fingerprint: Fingerprint) -> Fingerprint:
        """Return a request with the conversation that it only names by its ``previous_id``."""
        if fingerprint.previous_id is None:
            return fingerprint
        found = self._by_response.get((org, fingerprint.previous_id))
        return fingerprint.after(found.fingerprint) if found else fingerprint

    def _answered(self, caller: Caller, node: LineageNode) -> Iterator[LineageNode]:
        """Yield the requests of other conversations of a session whose answers nothing is known to
        have carried yet."""
        for other in self._find_forest(_forest_owner(caller, node.fingerprint)) or ():
            if other.answer and other.lineage != node.lineage:
                yield other

    def _find_forest(self, caller: Caller) -> Forest | None:
        org = self._orgs.get(caller.org)
        return org.get(caller.session) if org else None

    def _open_forest(self, caller: Caller, now: float) -> Forest:
        org = self._orgs.setdefault(caller.org, OrderedDict())
        forest = org.setdefault(caller.session, Forest())
        org.move_to_end(caller.session)
        session = caller.org, caller.session
        self._used[session] = now
        self._used.move_to_end(session)
        of_account = self._used_by.setdefault(self._account_of(caller.org), OrderedDict())
        of_account[session] = None
        of_account.move_to_end(session)
        return forest

    def _keep(self, caller: Caller, forest: Forest, node: LineageNode) -> None:
        forest.latest.append(node)
        self._grow(caller.org, forest, node.nbytes)
        if len(forest.latest) > self._requests:
            superseded = next((kept for kept in forest.latest if kept.superseded), None)
            if superseded is not None:
                self._drop(caller.org, forest, superseded)
            else:
                forest.shelve(forest.latest[0])
        if len(forest.older) > self._ends:
            self._drop(caller.org, forest, next(iter(forest.older)))
        self._keep_bounds(caller, forest)

    def _shrink(self, caller: Caller, forest: Forest) -> None:
        """Keep the bounds of a forest that several requests have come into at once."""
        while len(forest.latest) > self._requests:
            superseded = next((kept for kept in forest.latest if kept.superseded), None)
            self._drop(caller.org, forest, superseded or forest.latest[0])
        self._keep_bounds(caller, forest)

    def _keep_bounds(self, caller: Caller, forest: Forest) -> None:
        org = self._orgs[caller.org]
        while self._bytes_of[caller.org] > self._org_bytes and len(org) > 1:
            self._drop_forest(caller.org, next(iter(org)))
        while self.nbytes > self._max_bytes and len(self._used) > 1:
            self._drop_forest(*next(iter(self._used_by[self._shares.largest()])))
        # A single session may be too large by itself; the newest request always stays.
        while self._bytes_of[caller.org] > self._org_bytes and len(forest) > 1:
            self._drop(caller.org, forest, next(iter(forest)))

    def _expire(self, now: float) -> None:
        while self._used:
            (org, session), used = next(iter(self._used.items()))
            if used + self._ttl_s > now:
                break
            self._drop_forest(org, session)

    def _drop_forest(self, org: str, session: str | None) -> None:
        forest = self._orgs[org].pop(session)
        del self._used[org, session]
        account = self._account_of(org)
        del self._used_by[account][org, session]
        if not self._used_by[account]:
            del self._used_by[account]
        for node in forest:
            self._drop_id(org, node)
        self._grow(org, forest, -forest.nbytes)
        if not self._orgs[org]:
            del self._orgs[org]
            del self._bytes_of[org]

    def _drop(self, org: str, forest: Forest, node: LineageNode) -> None:
        forest.drop(node)
        self._drop_id(org, node)
        self._grow(org, forest, -node.nbytes)

    def _drop_id(self, org: str, node: LineageNode) -> None:
        # Another request may have been answered with the same id since.
        response_id = node.response_id
        if response_id is not None and self._by_response.get((org, response_id)) is node:
            del self._by_response[org, response_id]

    def _grow(self, org: str, forest: Forest, nbytes: int) -> None:
        forest.nbytes += nbytes
        self._bytes_of[org] = self._bytes_of.get(org, 0) + nbytes
        self._shares.add(self._account_of(org), nbytes)


def _note_key(owner: Caller, fingerprint: Fingerprint) -> NoteKey | None:
    """Return under which key notes on a request stand: its session's, or in traffic that names no
    session its conversation's; None if it has nothing to be known by."""
    if owner.session is not None:
        return NoteKey(owner.org, owner.session)
    opening = fingerprint.opening
    return NoteKey(owner.org, None, opening) if opening else None


def _forest_owner(caller: Caller, fingerprint: Fingerprint) -> Caller:
    """Return the organisation and session in whose forest a request of ``caller`` stands.

    For a request that names no session but a ``cache_salt``, the salt stands for the session:
    clients of different salts cannot read what the others have cached.
    """
    salt = fingerprint.params.get("cache_salt")
    if caller.session is not None or salt is None:
        return caller
    return Caller(caller.org, f"salt {salt.hex()}")
