"""An explanation of a block trace, which holds nothing but block hashes: where prefixes broke."""

from collections.abc import Iterable, Iterator

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.explanation import Explained
from vllm_cachescope.cli.findings.loss import cache_losses
from vllm_cachescope.cli.traffic import BLOCK_TOKENS, BlockCall
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis, DiagnosisKind


def explain_blocks(calls: Iterable[BlockCall], ttl_s: float | None = None) -> Iterator[Explained]:
    """Explain the calls of a block trace.

    There are no sessions in such a trace: a call is compared with all calls before it. The last
    block of a prompt may be partial; it has another hash once the conversation goes on.

    Args:
        calls: the calls, in order of time.
        ttl_s: TTL of a block in seconds, counted from its last use; None for no expiry.
    """
    last_call: dict[int, BlockCall] = {}
    lineage_of: dict[int, int] = {}
    lineages = 0
    for call in calls:
        known = _leading(call, last_call, None)
        fresh = _leading(call, last_call, ttl_s)
        before = last_call[call.blocks[known - 1]] if known else None
        partial = 0
        if before is None:
            kind = DiagnosisKind.NEW_LINEAGE if last_call else DiagnosisKind.FIRST_REQUEST
        elif known == len(call.blocks):
            kind = DiagnosisKind.RETRY if before.blocks == call.blocks else DiagnosisKind.FORK
        elif known == len(before.blocks):
            kind = DiagnosisKind.CONTINUATION
        elif known == len(before.blocks) - 1 and before.tokens % BLOCK_TOKENS:
            kind = DiagnosisKind.CONTINUATION
            partial = max(0, min(before.tokens, call.tokens) - known * BLOCK_TOKENS)
        else:
            kind = DiagnosisKind.FORK
        if kind in (DiagnosisKind.CONTINUATION, DiagnosisKind.RETRY):
            lineage = lineage_of[call.blocks[known - 1]]
        else:
            lineages += 1
            lineage = lineages
        diagnosis = _of_blocks(call, kind, known, fresh, partial, lineage, ttl_s)
        losses = tuple(cache_losses(diagnosis))
        yield Explained(call.source, None, call.at, diagnosis, losses=losses)
        for block in call.blocks:
            last_call[block] = call
            lineage_of[block] = lineage


def _leading(call: BlockCall, last_call: dict[int, BlockCall], ttl_s: float | None) -> int:
    """Return how many leading blocks of ``call`` an earlier call had, at most ``ttl_s`` ago."""
    for i, block in enumerate(call.blocks):
        before = last_call.get(block)
        if before is None or (ttl_s is not None and call.at - before.at > ttl_s):
            return i
    return len(call.blocks)


def _of_blocks(
    call: BlockCall,
    kind: DiagnosisKind,
    known: int,
    fresh: int,
    partial: int,
    lineage: int,
    ttl_s: float | None,
) -> Diagnosis:
    shared = min(known * BLOCK_TOKENS, call.tokens)
    read = min(fresh * BLOCK_TOKENS, call.tokens)
    engine: list[CacheMiss] = []
    if shared > read and ttl_s is not None:
        engine.append(CacheMiss(MissCause.EXPIRED, shared - read, ttl_s=round(ttl_s)))
    if partial:
        engine.append(CacheMiss(MissCause.PARTIAL_BLOCK, partial))
    causes: dict[str, int] = {miss.cause: miss.tokens for miss in engine}
    rest = call.tokens - read - sum(causes.values())
    if rest:
        own = kind in (DiagnosisKind.FIRST_REQUEST, DiagnosisKind.NEW_LINEAGE)
        causes[kind if own else NEW_CONTENT] = rest
    return Diagnosis(
        kind=kind,
        expected=shared == read,
        where=None,
        changes=(),
        shared_tokens=shared,
        missed_tokens=0,
        prompt_tokens=call.tokens,
        uncached=tuple(causes.items()),
        engine=tuple(engine),
        lineage=lineage,
        measured=True,
    )
