"""Diagnoses a request: its shape shows what the client changed, the engine's report what the cache
did."""

from dataclasses import replace

from vllm_cachescope.cache.miss_causes import CacheMiss
from vllm_cachescope.diagnosis.advice import advise_on_changes, advise_on_misses
from vllm_cachescope.diagnosis.attribution import EngineReport, attribute_misses, uncached_by_cause
from vllm_cachescope.diagnosis.change_places import place_changes
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.comparison import compare
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.outcome import UNAVOIDABLE, Diagnosis, DiagnosisKind, Divergence
from vllm_cachescope.diagnosis.placement import LineagePlacement, Relation
from vllm_cachescope.diagnosis.prefix_match import match_prefix
from vllm_cachescope.durations import format_wait

_BY_RELATION = {
    Relation.FIRST: DiagnosisKind.FIRST_REQUEST,
    Relation.NEW_LINEAGE: DiagnosisKind.NEW_LINEAGE,
    Relation.CONTINUATION: DiagnosisKind.CONTINUATION,
    Relation.RETRY: DiagnosisKind.RETRY,
    Relation.FORK: DiagnosisKind.FORK,
    Relation.COMPACTION: DiagnosisKind.CONTEXT_COMPACTED,
}


def diagnose(placement: LineagePlacement) -> Diagnosis:
    """Return what the shapes of a request and its ancestor say; token counts are estimates."""
    new = placement.node.fingerprint
    kind = _kind(placement.relation, placement.changes)
    ancestor = placement.ancestor
    diverging = [change for change in placement.changes if change.diverges]
    where = None
    if kind.is_break or placement.missed_tokens:
        first = placement.changes[0] if placement.changes else None
        if first is not None:
            where = Divergence(first.area, first.path, first.token)
    elif placement.relation is Relation.FORK and placement.shared_tokens < new.tokens:
        part = next((i for i, end in enumerate(new.ends) if end > placement.shared_tokens), None)
        if part is not None:
            where = Divergence("messages", new.path(part), placement.shared_tokens)
    diagnosis = Diagnosis(
        kind=kind,
        expected=not kind.is_break or kind is DiagnosisKind.CONTEXT_COMPACTED,
        where=where,
        changes=placement.changes,
        shared_tokens=placement.shared_tokens,
        missed_tokens=placement.missed_tokens,
        prompt_tokens=new.tokens,
        uncached=(),
        suggestion=advise_on_changes(
            kind, diverging or list(placement.changes), placement.flapping
        ),
        lineage=placement.node.lineage,
        parent_lineage=placement.parent_lineage,
        ancestor_id=ancestor.response_id if ancestor else None,
        flapping=placement.flapping,
    )
    return replace(diagnosis, uncached=uncached_by_cause(diagnosis, placement.shared_tokens, ()))


def diagnose_against(old: Fingerprint, new: Fingerprint) -> Diagnosis:
    """Compare a request with one the client named, whatever their lineages.

    Kinds are breaks, or CONTINUATION if ``new`` has all of ``old`` or is the beginning of it.
    """
    shared = match_prefix(old, new)
    changes = compare(old, new)
    diverging = [change for change in changes if change.diverges]
    kind = _kind(Relation.BREAK, tuple(diverging)) if diverging else DiagnosisKind.CONTINUATION
    missed = max(0, min(old.tokens, new.tokens) - shared.tokens) if diverging else 0
    where = Divergence(changes[0].area, changes[0].path, changes[0].token) if diverging else None
    diagnosis = Diagnosis(
        kind=kind,
        expected=not kind.is_break or kind is DiagnosisKind.CONTEXT_COMPACTED,
        where=where,
        changes=changes,
        shared_tokens=shared.tokens,
        missed_tokens=missed,
        prompt_tokens=new.tokens,
        uncached=(),
        suggestion=advise_on_changes(kind, diverging, None),
    )
    return replace(diagnosis, uncached=uncached_by_cause(diagnosis, shared.tokens, ()))


def conclude(
    diagnosis: Diagnosis,
    report: EngineReport,
    ancestor: LineageNode | None = None,
    new: Fingerprint | None = None,
) -> Diagnosis:
    """Complete a diagnosis by the request's shape with what the engine found.

    Estimates are scaled to the prompt's true length. A break is expected if the engine read past
    the change, which then cost nothing. Tokens that were shared and not read are put down to causes
    by `attribute_misses`.

    Args:
        diagnosis: from `diagnose`.
        report: from the engine.
        ancestor: the request that it was compared with, from its `LineagePlacement`.
        new: the request; None to leave the order of changes as it is.
    """
    read = min(report.read_tokens, report.prompt_tokens)
    scale = _scale(diagnosis, report)
    known = ancestor.prompt_tokens if ancestor else None
    shared, exact = _shared(diagnosis, report, known, scale)
    missed = 0
    if diagnosis.missed_tokens:
        reach = _reach(diagnosis, report, known, scale)
        missed = max(0, _readable(reach, report) - max(read, shared))
    if report.prompts:
        # Which of them goes on from which is told by their tokens.
        engine = [miss for prompt in report.prompts for miss in _attribute_prompt(prompt)]
    else:
        covered = _covered(report, ancestor, scale)
        own = _own_tokens(diagnosis, ancestor, scale)
        engine = attribute_misses(report, read, shared, covered, exact, own)
    if shared > read or engine:
        shared = read + sum(miss.tokens for miss in engine)

    avoidable = any(miss.cause not in UNAVOIDABLE for miss in engine)
    harmless = diagnosis.kind.is_break and not missed
    placed = _scaled(diagnosis, report, scale)
    if new is not None:
        placed = _with_places(placed, diagnosis, report, new, scale)
    concluded = replace(
        placed,
        expected=(diagnosis.expected or harmless) and not avoidable,
        shared_tokens=shared,
        missed_tokens=missed,
        engine=tuple(engine),
        suggestion=placed.suggestion if missed else advise_on_misses(engine),
        waited=f"waited for memory {format_wait(report.memory_wait_s)}"
        if report.memory_wait_s
        else "",
    )
    return replace(concluded, uncached=uncached_by_cause(concluded, read, engine))


def _attribute_prompt(report: EngineReport) -> list[CacheMiss]:
    """Return the misses of one of several prompts."""
    shared = report.source.shared_tokens if report.source else 0
    covered = _covered(report, None, 1.0)
    return attribute_misses(report, report.read_tokens, shared, covered, exact=True)


def measure(
    diagnosis: Diagnosis, report: EngineReport, named: LineageNode | None = None
) -> Diagnosis:
    """Scale a comparison to what the engine found, as `conclude` does, but leave the cache out.

    What the engine read was not missed. Where the two prompts do not diverge, all that they share
    and the engine did not read was missed.

    Args:
        diagnosis: from `diagnose_against`.
        report: from the engine.
        named: the request that it was compared with.
    """
    read, scale = min(report.read_tokens, report.prompt_tokens), _scale(diagnosis, report)
    known = named.prompt_tokens if named else None
    shared, _ = _shared(diagnosis, report, known, scale)
    reach = _reach(diagnosis, report, known, scale)
    diverges = diagnosis.kind.is_break
    past = max(read, shared) if diverges else read
    missed = max(0, _readable(reach if diverges else shared, report) - past)
    measured = replace(
        _scaled(diagnosis, report, scale),
        shared_tokens=min(reach, max(read, shared)),
        missed_tokens=missed,
    )
    return replace(measured, uncached=uncached_by_cause(measured, read, ()))


def _scale(diagnosis: Diagnosis, report: EngineReport) -> float:
    """Return the prompt's tokens for each estimated one."""
    return report.prompt_tokens / diagnosis.prompt_tokens if diagnosis.prompt_tokens else 1.0


def _scaled(diagnosis: Diagnosis, report: EngineReport, scale: float) -> Diagnosis:
    """Return the diagnosis with its lengths and places in the engine's tokens."""

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


def _with_places(
    scaled: Diagnosis, diagnosis: Diagnosis, report: EngineReport, new: Fingerprint, scale: float
) -> Diagnosis:
    """Return ``scaled`` with its changes where the tokens of the prompts were seen to diverge."""
    if report.divergence is None or not diagnosis.changes or scaled.where is None:
        return scaled
    found = place_changes(diagnosis.changes, new, report.divergence, scale)
    first = found[0]
    where = Divergence(first.area, first.path, min(first.token, report.prompt_tokens))
    if where.path == scaled.where.path:
        return replace(scaled, where=where, changes=found)
    if scaled.kind is DiagnosisKind.CONTEXT_COMPACTED:
        return scaled
    kind = DiagnosisKind(f"{first.area}_changed") if scaled.kind.is_break else scaled.kind
    return replace(
        scaled,
        kind=kind,
        where=where,
        changes=found,
        suggestion=advise_on_changes(kind, found, None),
        flapping=None,
    )


def _own_tokens(diagnosis: Diagnosis, ancestor: LineageNode | None, scale: float) -> int:
    """Return about how many tokens a request has that its ancestor had not, in the engine's."""
    if ancestor is not None and ancestor.prompt_tokens and ancestor.fingerprint.tokens:
        # From before the template rendered anything differently.
        scale = ancestor.prompt_tokens / ancestor.fingerprint.tokens
    return round((diagnosis.prompt_tokens - diagnosis.shared_tokens) * scale)


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
        # From there on the tokens are equal, but their blocks have other hashes.
        rekeyed = [change.token for change in diagnosis.changes if change.rekeys]
        if rekeyed and report.source is not None:
            return report.source.left_tokens, True
        if rekeyed:
            return min(round(min(rekeyed) * scale), report.prompt_tokens), min(rekeyed) == 0
    if diagnosis.kind is DiagnosisKind.RETRY:
        return report.prompt_tokens, True
    if diagnosis.kind is DiagnosisKind.CONTINUATION and ancestor_tokens is not None:
        return min(ancestor_tokens, report.prompt_tokens), True
    if report.source is not None:
        return report.source.shared_tokens, True
    return min(round(diagnosis.shared_tokens * scale), report.prompt_tokens), False


def _covered(report: EngineReport, ancestor: LineageNode | None, scale: float) -> int | None:
    """Return how many tokens a breakpoint covered when they were computed; None if unknown."""
    if report.source is not None:
        covered = report.source.prompt.covered_tokens
    elif ancestor is not None:
        old, known = ancestor.fingerprint, ancestor.prompt_tokens
        covered = round(old.covered_tokens * (known / old.tokens if known else scale))
    else:
        return None
    return covered - covered % report.block_tokens


def _kind(relation: Relation, changes: tuple[Change, ...]) -> DiagnosisKind:
    if relation is not Relation.BREAK:
        return _BY_RELATION[relation]
    first = changes[0]
    if first.kind is ChangeKind.HISTORY_COMPACTED:
        return DiagnosisKind.CONTEXT_COMPACTED
    return DiagnosisKind(f"{first.area}_changed")
