"""Why a prompt was not read from the cache: what the client changed, and what the cache did."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.comparison import compare
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.flapping import FlappingField
from vllm_cachescope.diagnosis.lineage_store import Entry, Held, Placement, Relation
from vllm_cachescope.diagnosis.prefix_match import match_prefix
from vllm_cachescope.durations import format_duration


class Kind(StrEnum):
    """How a request differs from the one it goes on from.

    The first six are as they should be. The rest are breaks: something in front of content that
    had been cached is not what it was.
    """

    FIRST_REQUEST = "first_request"
    NEW_LINEAGE = "new_lineage"
    CONTINUATION = "continuation"
    RETRY = "retry"
    FORK = "fork"
    CONTEXT_COMPACTED = "context_compacted"
    MODEL_CHANGED = "model_changed"
    PARAMS_CHANGED = "params_changed"
    TOOLS_CHANGED = "tools_changed"
    SYSTEM_CHANGED = "system_changed"
    MESSAGES_CHANGED = "messages_changed"
    MARKERS_CHANGED = "markers_changed"

    @property
    def is_break(self) -> bool:
        """Whether it is a break, expected or not."""
        return self is Kind.CONTEXT_COMPACTED or self.value.endswith("_changed")


NEW_CONTENT = "new_content"
"""Cause of the tokens that no earlier request had: the turns that were added."""

_BY_RELATION = {
    Relation.FIRST: Kind.FIRST_REQUEST,
    Relation.NEW_LINEAGE: Kind.NEW_LINEAGE,
    Relation.CONTINUATION: Kind.CONTINUATION,
    Relation.RETRY: Kind.RETRY,
    Relation.FORK: Kind.FORK,
    Relation.COMPACTION: Kind.CONTEXT_COMPACTED,
}

# A prompt's last block is only cached once it is full; and who wants log probabilities of the
# prompt wants it computed.
_UNAVOIDABLE = (MissCause.PARTIAL_BLOCK, MissCause.NOT_LOOKED_UP)

# An estimated number of shared tokens may be this much too high, as a fraction.
_ESTIMATE_ERROR = 0.25


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engine found of one request, and what it might have found.

    Attributes:
        prompt_tokens: length of its prompt in tokens.
        read_tokens: leading tokens read from any tier.
        block_tokens: tokens per block.
        misses: what it looked for in vain, in prompt order, each tier naming what it knows.
        shared_tokens: exactly how many leading tokens the prompt has in common with its ancestor's;
            None to go by the estimate, or by ``held``.
        held: what an earlier request had left of it; None for nothing, or if that is not known.
        began: when it began, in seconds, on the clock of ``held``.
        engine: where it ran; must be there with ``held``.
        unasked: why a shared tier could not be asked for what this engine never had; no tokens.
        reach_s: how far back the engine's memory of what it had reaches, in seconds; None for all
            of it.
    """

    prompt_tokens: int
    read_tokens: int
    block_tokens: int
    misses: tuple[CacheMiss, ...] = ()
    shared_tokens: int | None = None
    held: Held | None = None
    began: float = 0.0
    engine: EngineId | None = None
    unasked: CacheMiss | None = None
    reach_s: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where two prompts part ways.

    Attributes:
        region: ``model``, ``params``, ``tools``, ``system``, ``messages`` or ``markers``.
        path: where in the client's body, as in ``tools[7]`` or ``messages[12].content[0]``.
        token: tokens of the prompt before it; an estimate, scaled to the prompt's true length once
            that is known.
    """

    region: str
    path: str
    token: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a request could not be read from the cache as far as it might have been.

    Attributes:
        kind: how it differs from the request it goes on from.
        expected: whether that is as it should be. False for every break but a compaction, and for
            tokens that the cache lost.
        where: where the two part ways; None if they do not.
        changes: what changed, the earliest first: ``changes[0]`` is the cause, the rest would have
            broken the prefix later.
        shared_tokens: leading tokens some earlier request of the session has too.
        missed_tokens: tokens that could have been read but for the change.
        prompt_tokens: tokens of the whole prompt.
        uncached: every token that was not read, by cause: a `Kind`, an `MissCause` or
            `NEW_CONTENT`, with the number of tokens.
        engine: what the engine did, as far as it explains a miss.
        suggestion: what to do about it, in a sentence; empty if there is nothing to do.
        lineage: number of the request's lineage in its session.
        parent_lineage: the lineage it branched off from, if it began one.
        ancestor_id: response id of the request it was compared with, if it has one.
        latch: set if the field that changed keeps changing.
        measured: whether the engine has counted the tokens; if not, all counts are estimates.
    """

    kind: Kind
    expected: bool
    where: Place | None
    changes: tuple[Change, ...]
    shared_tokens: int
    missed_tokens: int
    prompt_tokens: int
    uncached: tuple[tuple[str, int], ...]
    engine: tuple[CacheMiss, ...] = ()
    suggestion: str = ""
    lineage: int = 0
    parent_lineage: int | None = None
    ancestor_id: str | None = None
    latch: FlappingField | None = None
    measured: bool = False

    @property
    def cause(self) -> str:
        """The one cause to count this request under: a `Kind` or an `MissCause`."""
        if self.kind.is_break and self.missed_tokens:
            return self.kind
        avoidable = [miss for miss in self.engine if miss.cause not in _UNAVOIDABLE]
        if avoidable:
            return max(avoidable, key=lambda miss: miss.tokens).cause
        return self.kind

    @property
    def unknown_tokens(self) -> int:
        """Tokens whose absence nothing explains: a gap in what the tiers report."""
        return sum(tokens for cause, tokens in self.uncached if cause == MissCause.UNKNOWN)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools and parameters that changed, each once."""
        return tuple(dict.fromkeys(name for change in self.changes for name in change.names))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON, without the hashes."""
        data = asdict(self)
        for change in data["changes"]:
            del change["value"], change["old_value"]
        data["uncached"] = dict(self.uncached)
        data["cause"] = self.cause
        return data


def diagnose(placement: Placement) -> Diagnosis:
    """Return what the requests' shapes say; token counts are estimates."""
    new = placement.entry.fingerprint
    kind = _kind(placement.relation, placement.changes)
    ancestor = placement.ancestor
    diverging = [change for change in placement.changes if change.diverges]
    where = None
    if kind.is_break or placement.missed_tokens:
        first = placement.changes[0] if placement.changes else None
        if first is not None:
            where = Place(first.area, first.path, first.token)
    elif placement.relation is Relation.FORK and placement.shared_tokens < new.tokens:
        part = next((i for i, end in enumerate(new.ends) if end > placement.shared_tokens), None)
        if part is not None:
            where = Place("messages", new.path(part), placement.shared_tokens)
    diagnosis = Diagnosis(
        kind=kind,
        expected=not kind.is_break or kind is Kind.CONTEXT_COMPACTED,
        where=where,
        changes=placement.changes,
        shared_tokens=placement.shared_tokens,
        missed_tokens=placement.missed_tokens,
        prompt_tokens=new.tokens,
        uncached=(),
        suggestion=_advice(kind, diverging or list(placement.changes), placement.latch),
        lineage=placement.entry.lineage,
        parent_lineage=placement.parent_lineage,
        ancestor_id=ancestor.response_id if ancestor else None,
        latch=placement.latch,
    )
    return replace(diagnosis, uncached=_uncached(diagnosis, placement.shared_tokens, ()))


def diagnose_against(old: Fingerprint, new: Fingerprint) -> Diagnosis:
    """Compare a request with one the client named, whatever their lineages.

    Kinds are breaks, or CONTINUATION if ``new`` has all of ``old`` or is the beginning of it.
    """
    shared = match_prefix(old, new)
    changes = compare(old, new)
    diverging = [change for change in changes if change.diverges]
    kind = _kind(Relation.BREAK, tuple(diverging)) if diverging else Kind.CONTINUATION
    missed = max(0, min(old.tokens, new.tokens) - shared.tokens) if diverging else 0
    where = Place(changes[0].area, changes[0].path, changes[0].token) if diverging else None
    diagnosis = Diagnosis(
        kind=kind,
        expected=not kind.is_break or kind is Kind.CONTEXT_COMPACTED,
        where=where,
        changes=changes,
        shared_tokens=shared.tokens,
        missed_tokens=missed,
        prompt_tokens=new.tokens,
        uncached=(),
        suggestion=_advice(kind, diverging, None),
    )
    return replace(diagnosis, uncached=_uncached(diagnosis, shared.tokens, ()))


def conclude(
    diagnosis: Diagnosis, report: EngineReport, ancestor: Entry | None = None
) -> Diagnosis:
    """Complete what the request's shape says with what the engine found.

    Estimates are scaled to the prompt's true length. A change that cost nothing, because the
    engine read past it, is no longer held against the request. Tokens that were shared and not
    read are divided among causes by `_divide`.

    Args:
        diagnosis: from `diagnose`.
        report: from the engine.
        ancestor: the request it was compared with, from its `Placement`.
    """
    read = min(report.read_tokens, report.prompt_tokens)
    scale = _scale(diagnosis, report)
    known = ancestor.prompt_tokens if ancestor else None
    shared, exact = _shared(diagnosis, report, known, scale)
    missed = 0
    if diagnosis.missed_tokens:
        reach = _reach(diagnosis, report, known, scale)
        missed = max(0, _readable(reach, report) - max(read, shared))
    covered = _covered(report, ancestor, scale)
    engine = _divide(diagnosis.kind, report, read, shared, covered, exact)
    shared = read + sum(miss.tokens for miss in engine) if shared > read else shared

    avoidable = any(miss.cause not in _UNAVOIDABLE for miss in engine)
    harmless = diagnosis.kind.is_break and not missed
    concluded = replace(
        _scaled(diagnosis, report, scale),
        expected=(diagnosis.expected or harmless) and not avoidable,
        shared_tokens=shared,
        missed_tokens=missed,
        engine=tuple(engine),
        suggestion=diagnosis.suggestion if missed else _engine_advice(engine),
    )
    return replace(concluded, uncached=_uncached(concluded, read, engine))


def measure(diagnosis: Diagnosis, report: EngineReport, named: Entry | None = None) -> Diagnosis:
    """Scale a comparison to what the engine found, as `conclude` does, with no word on the cache.

    What the engine read was not missed. Where the two prompts do not part ways, all of what they
    share and the engine did not read was.

    Args:
        diagnosis: from `diagnose_against`.
        report: from the engine.
        named: the request that it was compared with.
    """
    read, scale = min(report.read_tokens, report.prompt_tokens), _scale(diagnosis, report)
    known = named.prompt_tokens if named else None
    shared, _ = _shared(diagnosis, report, known, scale)
    reach = _reach(diagnosis, report, known, scale)
    parts_ways = diagnosis.kind.is_break
    past = max(read, shared) if parts_ways else read
    missed = max(0, _readable(reach if parts_ways else shared, report) - past)
    measured = replace(
        _scaled(diagnosis, report, scale),
        shared_tokens=min(reach, max(read, shared)),
        missed_tokens=missed,
    )
    return replace(measured, uncached=_uncached(measured, read, ()))


def _scale(diagnosis: Diagnosis, report: EngineReport) -> float:
    """Return the prompt's tokens for each estimated one."""
    return report.prompt_tokens / diagnosis.prompt_tokens if diagnosis.prompt_tokens else 1.0


def _scaled(diagnosis: Diagnosis, report: EngineReport, scale: float) -> Diagnosis:
    """Put the prompt's length and every place in it into the engine's tokens."""

    def token(estimate: int) -> int:
        return min(report.prompt_tokens, round(estimate * scale))

    where = diagnosis.where
    return replace(
        diagnosis,
        where=where and replace(where, token=token(where.token)),
        changes=tuple(replace(c, token=token(c.token)) for c in diagnosis.changes),
        prompt_tokens=report.prompt_tokens,
        measured=True,
    )


def _reach(
    diagnosis: Diagnosis, report: EngineReport, ancestor_tokens: int | None, scale: float
) -> int:
    """Return how many tokens the prompt would share with its ancestor's but for the change."""
    estimate = round((diagnosis.shared_tokens + diagnosis.missed_tokens) * scale)
    return min(report.prompt_tokens, estimate if ancestor_tokens is None else ancestor_tokens)


def _readable(tokens: int, report: EngineReport) -> int:
    """Return how many of the prompt's first ``tokens`` could be read: whole blocks, and never the
    last token, from which the answer starts."""
    tokens = min(tokens, report.prompt_tokens - 1)
    return tokens - tokens % report.block_tokens


def _shared(
    diagnosis: Diagnosis, report: EngineReport, ancestor_tokens: int | None, scale: float
) -> tuple[int, bool]:
    """Return how many tokens should have been there, and whether that is exact."""
    if report.shared_tokens is not None:
        return min(report.shared_tokens, report.prompt_tokens), True
    if diagnosis.kind.is_break:
        # Equal tokens, and blocks of other keys from there on.
        rekeyed = [change.token for change in diagnosis.changes if change.rekeys]
        if rekeyed:
            return min(round(min(rekeyed) * scale), report.prompt_tokens), min(rekeyed) == 0
    if diagnosis.kind is Kind.RETRY:
        return report.prompt_tokens, True
    if diagnosis.kind is Kind.CONTINUATION and ancestor_tokens is not None:
        return min(ancestor_tokens, report.prompt_tokens), True
    if report.held is not None:
        return report.held.shared_tokens, True
    return min(round(diagnosis.shared_tokens * scale), report.prompt_tokens), False


def _covered(report: EngineReport, ancestor: Entry | None, scale: float) -> int | None:
    """Return how many tokens a breakpoint covered when they were computed; None if unknown."""
    if report.held is not None:
        covered = report.held.run.covered_tokens
    elif ancestor is not None:
        old, known = ancestor.fingerprint, ancestor.prompt_tokens
        covered = round(old.covered_tokens * (known / old.tokens if known else scale))
    else:
        return None
    return covered - covered % report.block_tokens


def _divide(
    kind: Kind, report: EngineReport, read: int, shared: int, covered: int | None, exact: bool
) -> list[CacheMiss]:
    """Put each of the tokens from ``read`` to ``shared`` down to one cause.

    First to what the engine reports, from the front on; then to what a block's edge, the
    breakpoints and the place where the tokens had been computed explain; and what is left over to
    `MissCause.UNKNOWN`. Where ``shared`` is an estimate, tokens within its error have no cause.
    """
    held, block = report.held, report.block_tokens
    engine: list[CacheMiss] = []
    behind: list[CacheMiss] = []
    end = max(read, shared)
    if held is not None:
        # Equal requests, and unequal tokens: the template did it.
        same = max(read, held.shared_tokens)
        if end - end % held.run.tokens.step > same:
            behind.append(CacheMiss(MissCause.RENDERED_DIFFERENTLY, end - same))
            end = same
        # A block that only begins in what later requests may read is not theirs to read.
        readable = held.run.readable_tokens
        if end > readable and end > (readable := max(read, readable - readable % block)):
            behind.insert(0, _never_stored(end - readable, _UNREADABLE))
            end = readable
    left = end - read
    if left and end < block:
        return [_never_stored(left, "shorter than one block"), *behind]
    # Only whole blocks are cached, and a retry's last one is computed again: the answer starts
    # from its last token.
    edge = end % block or (block if kind is Kind.RETRY and end == report.prompt_tokens else 0)
    if exact or left < block:
        edge = min(left, edge if exact else left)
        behind.insert(0, CacheMiss(MissCause.PARTIAL_BLOCK, edge))
        left -= edge
        end -= edge
    for miss in report.misses:
        if tokens := min(miss.tokens, left):
            # Evicted from the device, the only place where it ever was.
            bare = 0
            if covered is not None and miss.cause is MissCause.EVICTED and not miss.detail:
                bare = min(tokens, max(0, end - left + tokens - covered))
            if tokens > bare:
                engine.append(replace(miss, tokens=tokens - bare))
            if bare:
                engine.append(_never_stored(bare, _UNCOVERED))
            left -= tokens
    if left and held is not None and held.run.computed_at > report.began:
        engine.append(_never_stored(left, _IN_FLIGHT))
        left = 0
    if covered is not None and not _elsewhere(report):
        bare = min(left, max(0, end - covered))
        engine += [_never_stored(bare, _UNCOVERED)] if bare else []
        left -= bare
    if left and held is not None and (why := _remote_cause(report, held, left)) is not None:
        engine.append(why)
        left = 0
    if left and not exact:
        # Less than the estimate's error: the prefix ends a little before where it was put.
        slack = min(left, round(shared * _ESTIMATE_ERROR) + block)
        left = 0 if left == slack else left
    if left:
        engine.append(CacheMiss(MissCause.UNKNOWN, left))
    return engine + [miss for miss in behind if miss.tokens]


def _never_stored(tokens: int, detail: str) -> CacheMiss:
    return CacheMiss(MissCause.NEVER_STORED, tokens, detail=detail)


_UNCOVERED = "not covered by a breakpoint"
_UNREADABLE = "session scope, and the request named no session"
_IN_FLIGHT = "an earlier request was still computing it"


def _elsewhere(report: EngineReport) -> bool:
    """Whether another engine's own memory held the tokens, and no tier that this one shares."""
    if report.held is None or report.engine is None or report.engine.tiers:
        return False
    return _is_other(report.engine, report.held.run.engine)


def _is_other(engine: EngineId, other: EngineId) -> bool:
    return (engine.rank, engine.epoch) != (other.rank, other.epoch)


def _remote_cause(report: EngineReport, held: Held, tokens: int) -> CacheMiss | None:
    """Return why the engine knows nothing of tokens that were computed once; None if it should."""
    here, there = report.engine, held.run.engine
    assert here is not None
    if _is_other(here, there):
        if report.unasked is not None:
            return replace(report.unasked, tokens=tokens)
        if here.tiers and here.hashing != there.hashing:
            return CacheMiss(MissCause.HASH_SETTINGS_DIFFER, tokens)
        names = " and ".join(here.tiers)
        no_copy = f"{names} had no copy" if names else ""
        if here.rank == there.rank:
            cause, where = MissCause.ENGINE_RESTARTED, ""
        else:
            cause, where = MissCause.OTHER_REPLICA, f"it was on engine {there.rank}"
        detail = ", and ".join(filter(None, (where, no_copy)))
        return CacheMiss(cause, tokens, detail=detail or None)
    idle_s = report.began - held.run.used_at
    if report.reach_s is None or idle_s <= report.reach_s:
        return None
    # Too long ago for the engine to remember. A lifetime that is over needs no witness; and who
    # left before its end has been evicted.
    if idle_s > held.run.ttl_s:
        age_s = idle_s - held.run.ttl_s
        return CacheMiss(MissCause.EXPIRED, tokens, ttl_s=held.run.ttl_s, age_s=age_s)
    return CacheMiss(MissCause.EVICTED, tokens, detail="too long ago to be remembered")


def _kind(relation: Relation, changes: tuple[Change, ...]) -> Kind:
    if relation is not Relation.BREAK:
        return _BY_RELATION[relation]
    first = changes[0]
    if first.kind is ChangeKind.HISTORY_COMPACTED:
        return Kind.CONTEXT_COMPACTED
    return Kind(f"{first.area}_changed")


def _uncached(
    diagnosis: Diagnosis, read: int, engine: Iterable[CacheMiss]
) -> tuple[tuple[str, int], ...]:
    """Put every token from ``read`` on down to a cause."""
    causes: dict[str, int] = {}
    left = diagnosis.prompt_tokens - read
    for miss in engine:
        causes[miss.cause] = causes.get(miss.cause, 0) + miss.tokens
        left -= miss.tokens
    whole = diagnosis.kind in (Kind.FIRST_REQUEST, Kind.NEW_LINEAGE)
    own = left if whole else min(left, diagnosis.missed_tokens)
    if own > 0:
        causes[diagnosis.kind] = causes.get(diagnosis.kind, 0) + own
        left -= own
    if left > 0:
        causes[NEW_CONTENT] = left
    return tuple(causes.items())


def _advice(kind: Kind, changes: list[Change], latch: FlappingField | None) -> str:
    """Say in a sentence what to do about the first of ``changes``."""
    if not changes or kind is Kind.CONTEXT_COMPACTED:
        return ""
    change = changes[0]
    advice = _ADVICE[change.kind].format(
        path=change.path,
        names=_list(change.names),
        fields=_list(change.fields),
        before=change.before,
        after=change.after,
    )
    if latch is None:
        return advice
    habit = "goes back and forth" if latch.returns else "is new each time"
    return f"{advice} It {habit}: {latch.flips} changes so far, about {latch.tokens_lost} tokens."


def _list(names: tuple[str, ...], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


_ADVICE = {
    ChangeKind.MODEL: "Stay with one model in a conversation: {after} cannot read what {before} "
    "cached.",
    ChangeKind.PARAM_ADDED: "Send {names} from the first request on, or not at all.",
    ChangeKind.PARAM_REMOVED: "Keep sending {names} as before.",
    ChangeKind.PARAM_CHANGED: "Keep {names} the same for the whole conversation.",
    ChangeKind.TOOLS_ADDED: "Send all tools from the first request on: {names} came later.",
    ChangeKind.TOOLS_REMOVED: "Keep {names} among the tools, and refuse the call instead.",
    ChangeKind.TOOLS_REORDERED: "Sort the tools by name before sending them.",
    ChangeKind.TOOL_CHANGED: "Keep {fields} of {names} fixed; move what varies into a message.",
    ChangeKind.TOOL_KEYS_REORDERED: "Serialise the schema of {names} with sorted keys.",
    ChangeKind.SYSTEM_ADDED: "Put {path} into a message: it came after the conversation began.",
    ChangeKind.SYSTEM_REMOVED: "Keep {path}, or put it into a message to begin with.",
    ChangeKind.SYSTEM_CHANGED: "Move the value that varies in {path} into the latest message.",
    ChangeKind.SYSTEM_REORDERED: "Keep the order of the system blocks from {path} on.",
    ChangeKind.MESSAGES_ADDED: "Append to the conversation: {path} was put in before its end.",
    ChangeKind.MESSAGES_REMOVED: "Keep {path} in the history, or drop much at once and seldom.",
    ChangeKind.MESSAGES_CHANGED: "Leave {path} as it was first sent; append a correction instead.",
    ChangeKind.MESSAGES_REORDERED: "Keep the order of the messages from {path} on.",
    ChangeKind.HISTORY_COMPACTED: "",
    ChangeKind.MARK_ADDED: "Set {path} from the first request on.",
    ChangeKind.MARK_REMOVED: "Keep the breakpoint {path}: what it covered is no longer stored.",
    ChangeKind.TTL_CHANGED: "Keep {path} at {before}.",
    ChangeKind.SCOPE_CHANGED: "Keep {path} at {before}: each scope has cache entries of its own.",
}


def _engine_advice(misses: list[CacheMiss]) -> str:
    """Say in a sentence what to do about the largest of ``misses``."""
    avoidable = [miss for miss in misses if miss.cause not in _UNAVOIDABLE]
    if not avoidable:
        return ""
    miss = max(avoidable, key=lambda miss: miss.tokens)
    if miss.cause is MissCause.EXPIRED and miss.ttl_s is not None:
        longer = "1h" if miss.ttl_s < 3600 else "a longer lifetime"
        return f"Use {longer}: the prefix expired after {format_duration(miss.ttl_s)} without use."
    if miss.cause is MissCause.NEVER_STORED and miss.detail:
        return f"{_ENGINE_ADVICE[miss.cause]} ({miss.detail})."
    return f"{_ENGINE_ADVICE[miss.cause]}."


_ENGINE_ADVICE = {
    MissCause.EXPIRED: "Use a longer lifetime",
    MissCause.EVICTED: "Give the tier more memory, or fewer prompts a long lifetime",
    MissCause.NEVER_STORED: "Set a breakpoint at or after the end of what is to be reused",
    MissCause.TIER_UNAVAILABLE: "Bring the tier back; until then its entries are misses",
    MissCause.TIMED_OUT: "Raise the tier's deadline, or relieve the tier",
    MissCause.ENGINE_RESTARTED: "Use a tier that outlives the engine",
    MissCause.OTHER_REPLICA: "Route a session to one replica, or share a tier between replicas",
    MissCause.HASH_SETTINGS_DIFFER: "Give all engines one secret, one hash algorithm and one "
    "PYTHONHASHSEED",
    MissCause.RENDERED_DIFFERENTLY: "Use a chat template that renders earlier turns as it did "
    "before: this one leaves out or changes what it had rendered",
    MissCause.UNKNOWN: "Report this: a tier lost tokens without saying why",
}
