"""The placement of a request in its session's forest: which request it goes on from, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_cachescope.diagnosis.alignment import part_hashes
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.compaction import find_compaction
from vllm_cachescope.diagnosis.comparison import compare, compare_whole
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.flapping import FlappingField
from vllm_cachescope.diagnosis.forest import Forest, LineageNode
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
from vllm_cachescope.prompt.request import Protocol, Region


class Relation(StrEnum):
    """How a request stands to the earlier request it is nearest to, its ancestor.

    Attributes:
        FIRST: it is the first of its session.
        NEW_LINEAGE: it begins a conversation of its own.
        CONTINUATION: it goes on from the ancestor, unchanged.
        RETRY: it is the same request once more.
        FORK: it shares a beginning with the ancestor and goes on in another way.
        COMPACTION: it goes on with a summary in place of much of the ancestor.
        BREAK: it goes on from the ancestor, but changed something in front of what was cached.
    """

    FIRST = "first_request"
    NEW_LINEAGE = "new_lineage"
    CONTINUATION = "continuation"
    RETRY = "retry"
    FORK = "fork"
    COMPACTION = "compaction"
    BREAK = "break"


@dataclass(frozen=True, slots=True)
class LineagePlacement:
    """Where a request belongs in the forest of its session.

    Attributes:
        relation: how it stands to ``ancestor``.
        node: the request, as the forest keeps it from now on.
        ancestor: the nearest earlier request; None for the first of a session.
        parent_lineage: the lineage it branched off from, if it began one.
        shared_tokens: estimated leading tokens that some earlier request of the session has too.
        missed_tokens: estimated tokens after those that would have been shared but for a change.
        changes: what differs from ``ancestor``, earliest first; nothing for a fork, whose messages
            are meant to differ.
        flapping: the field that changed earliest, if it keeps changing.
        idle_s: seconds since ``ancestor`` came; None without one.
        ancestor_was: whether ``ancestor`` was superseded, and whether it was continued, before.
    """

    relation: Relation
    node: LineageNode
    ancestor: LineageNode | None
    parent_lineage: int | None
    shared_tokens: int
    missed_tokens: int
    changes: tuple[Change, ...]
    flapping: FlappingField | None
    idle_s: float | None
    ancestor_was: tuple[bool, bool] = (False, False)


def place(forest: Forest, new: Fingerprint, now: float) -> LineagePlacement:
    """Find the nearest ancestor of a request among those of its session, and how it stands to it.

    The request itself is not put into the forest.

    Args:
        forest: the session's earlier requests; its ancestor's state there is brought up to date.
        new: the request.
        now: when it came, on the lineage store's clock, in seconds.
    """
    is_raw = _is_raw(new)
    candidates = [kept for kept in forest.candidates(new) if _is_raw(kept.fingerprint) == is_raw]
    nearest: LineageNode | None = None
    shared = PrefixMatch(0, 0, False)
    agreed = b""
    for node in reversed(candidates):
        # Most can be ruled out without a comparison: they agree less far than the nearest so far,
        # or exactly as far.
        if not node.fingerprint.hashes.startswith(agreed):
            continue
        if nearest and (
            diverges_here(node.fingerprint, new, shared)
            or diverges_alike(node.fingerprint, nearest.fingerprint, shared)
        ):
            continue
        found = match_prefix(node.fingerprint, new)
        if nearest is None or (found.tokens, found.whole) > (shared.tokens, shared.whole):
            nearest, shared = node, found
            agreed = new.hashes[: shared.parts * HASH_BYTES]
            if shared.whole and shared.parts == len(new):
                break  # It is the same request.
    if nearest is None:
        relation = Relation.NEW_LINEAGE if len(forest) else Relation.FIRST
        return _begin_lineage(forest, relation, new, now)
    # A request that an earlier one repeats in full misses nothing.
    if shared.parts < len(new):
        parent_known = shared.whole and shared.parts >= new.parent_parts
        if (broken := _broken(candidates, new, shared, parent_known)) is not None:
            changes = compare(broken.fingerprint, new)
            compacted = changes[:1] and changes[0].kind is ChangeKind.HISTORY_COMPACTED
            relation = Relation.COMPACTION if compacted else Relation.BREAK
            return _continue_lineage(forest, relation, broken, new, shared.tokens, changes, now)
        if (old := _compacted(candidates, new, shared)) is not None:
            changes = compare(old.fingerprint, new)
            return _continue_lineage(
                forest, Relation.COMPACTION, old, new, shared.tokens, changes, now
            )
    return _relate(forest, candidates, nearest, new, shared, now)


def _is_raw(fingerprint: Fingerprint) -> bool:
    """Whether the prompt is tokenised as it is sent. A template renders the same text otherwise."""
    return fingerprint.protocol is Protocol.COMPLETIONS


def _broken(
    candidates: Sequence[LineageNode], new: Fingerprint, shared: PrefixMatch, parent_known: bool
) -> LineageNode | None:
    """Return the conversation that ``new`` would have shared more with, had the client not changed
    it; None if there is none.

    Args:
        candidates: the session's requests to compare with, oldest first.
        new: the request.
        shared: how far ``new`` agrees with the nearest of them.
        parent_known: whether the request that ``new`` goes on from is among them.
    """
    best: LineageNode | None = None
    most = (shared.tokens, 0)
    beyond = range(shared.parts, len(new))
    messages = part_hashes(new, range(new.static_parts, len(new)))
    static, known = new.static_hashes, frozenset(messages)
    opening = new.is_opening
    for node in reversed(candidates):
        # A request without any answer can only be the same question, asked with a change.
        if opening and node.fingerprint.message_hashes != new.message_hashes:
            continue
        if node.superseded or is_unrelated(node.fingerprint, static, known):
            continue
        # With the parent known, only parts after the parent's can stand in another one as well.
        if parent_known and not may_share(node.fingerprint, new, beyond):
            continue
        found = match_prefix(node.fingerprint, new)
        # Parts of a side call, under a system prompt of its own, are no loss.
        if parent_known and not same_static(node.fingerprint, new, found):
            continue
        could = reusable_tokens(node.fingerprint, new, found, parent_known, messages)
        if could > shared.tokens and (could, found.tokens) > most:
            best, most = node, (could, found.tokens)
    return best


def _compacted(
    candidates: Sequence[LineageNode], new: Fingerprint, shared: PrefixMatch
) -> LineageNode | None:
    """Return the conversation that ``new`` begins anew from a summary.

    A summary does not say which conversation it sums up; the longest is the likeliest.
    """
    beyond = range(shared.parts, len(new))
    declared = any(new.has(part, Trait.COMPACTION) for part in beyond)
    # A summary stands where the conversation parts from what was said before.
    summed = shared.parts > new.static_parts and any(
        new.has(part, Trait.SUMMARY) for part in beyond[:2]
    )
    if not declared and not summed and not new.is_opening:
        return None
    compacted = [
        node
        for node in reversed(candidates)
        if not node.superseded
        and (declared or not node.fingerprint.is_opening)
        and (declared or new.is_opening or len(node.fingerprint) > len(new))
        and find_compaction(node.fingerprint, new) is not None
    ]
    return max(compacted, key=lambda node: node.fingerprint.tokens, default=None)


def _relate(
    forest: Forest,
    candidates: Sequence[LineageNode],
    nearest: LineageNode,
    new: Fingerprint,
    shared: PrefixMatch,
    now: float,
) -> LineagePlacement:
    """Place a request that could not have shared more with any earlier one's messages."""
    old, static = nearest.fingerprint, new.static_parts
    if shared.whole and shared.tokens:
        changes = compare_whole(old, new)
        if (kept := _still_cached(old, new, shared.tokens, changes)) < shared.tokens:
            return _continue_lineage(forest, Relation.BREAK, nearest, new, kept, changes, now)
        same = len(new) == shared.parts
        relation = Relation.RETRY if same else Relation.CONTINUATION
        if not nearest.continued:
            return _continue_lineage(forest, relation, nearest, new, shared.tokens, changes, now)
        # The conversation went on from there; this is another branch of it.
        branch = Relation.RETRY if same else Relation.FORK
        return _begin_lineage(forest, branch, new, now, nearest, shared.tokens)
    elif same_static(old, new, shared) and is_answer_to_less(old, new, shared):
        return _continue_lineage(
            forest, Relation.CONTINUATION, nearest, new, shared.tokens, (), now
        )
    beyond = shared.tokens > new.start(static) or shared.parts == len(new) > 0
    if same_static(old, new, shared) and beyond:
        return _begin_lineage(forest, Relation.FORK, new, now, nearest, shared.tokens)
    twin = _twin(candidates, new)
    if twin is None:
        return _begin_lineage(forest, Relation.NEW_LINEAGE, new, now, nearest, shared.tokens)
    changes = tuple(
        change
        for change in compare(twin.fingerprint, new)
        if change.area not in ("messages", "markers") and change.diverges
    )
    could = min(new.start(static), twin.fingerprint.start(twin.fingerprint.static_parts))
    missed = max(0, could - shared.tokens) if changes else 0
    return _begin_lineage(
        forest,
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


def _twin(candidates: Sequence[LineageNode], new: Fingerprint) -> LineageNode | None:
    """Return a request of another conversation whose tools and system are nearly the same."""
    names = {tool.name for tool in new.tools}
    for node in reversed(candidates):
        old = node.fingerprint
        if (
            old.model == new.model
            and old.counts[Region.SYSTEM] == new.counts[Region.SYSTEM]
            and {tool.name for tool in old.tools} == names
            and new.static_parts
            and similar_system(old, new)
        ):
            return node
    return None


def _continue_lineage(
    forest: Forest,
    relation: Relation,
    ancestor: LineageNode,
    new: Fingerprint,
    shared_tokens: int,
    changes: tuple[Change, ...],
    now: float,
) -> LineagePlacement:
    """Place ``new`` in the lineage of ``ancestor``."""
    was = (ancestor.superseded, ancestor.continued)
    # That it was compacted is only inferred: the conversation may still go on as it was.
    ancestor.superseded = relation is not Relation.COMPACTION or ancestor.superseded
    ancestor.continued |= relation in (Relation.CONTINUATION, Relation.RETRY)
    missed, flapping = 0, None
    if relation in (Relation.BREAK, Relation.COMPACTION):
        missed = max(0, min(ancestor.fingerprint.tokens, new.tokens) - shared_tokens)
    if relation is Relation.BREAK and changes:
        flapping = forest.flapping.note(ancestor.lineage, changes[0], missed)
    return LineagePlacement(
        relation,
        LineageNode(new, ancestor.lineage, now),
        ancestor,
        None,
        shared_tokens,
        missed,
        changes,
        flapping,
        now - ancestor.at,
        was,
    )


def _begin_lineage(
    forest: Forest,
    relation: Relation,
    new: Fingerprint,
    now: float,
    ancestor: LineageNode | None = None,
    shared_tokens: int = 0,
    changes: tuple[Change, ...] = (),
    missed_tokens: int = 0,
) -> LineagePlacement:
    """Place ``new`` at the start of a lineage of its own."""
    forest.lineages += 1
    branches = relation in (Relation.FORK, Relation.RETRY)
    return LineagePlacement(
        relation,
        LineageNode(new, forest.lineages, now),
        ancestor,
        ancestor.lineage if branches and ancestor is not None else None,
        shared_tokens,
        missed_tokens,
        changes,
        None,
        None if ancestor is None else now - ancestor.at,
    )
