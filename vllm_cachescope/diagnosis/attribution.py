"""The attribution of misses: each token that was not read is put down to one cause."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.change_places import MeasuredDivergence
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt, PrefixSource
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis, DiagnosisKind

_UNCOVERED = "not covered by a breakpoint"

# An estimated number of shared tokens may be this much too high, as a fraction.
_ESTIMATE_ERROR = 0.25


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engine found in the cache for one request, and what it should have found.

    Attributes:
        prompt_tokens: length of its prompt in tokens.
        read_tokens: leading tokens read from any tier.
        block_tokens: tokens per block.
        misses: the tokens that it missed, in prompt order; see `cache.report.Report`.
        shared_tokens: exactly how many leading tokens the prompt has in common with its ancestor's;
            None to go by the estimate, or by ``source``.
        source: where its prefix should have been read from; None if there is no earlier prompt, or
            if that is not known.
        began: when the request began, in seconds, on the clock of ``source``.
        engine: the engine that computed the prompt; must be set if ``source`` is.
        unasked: why a shared tier could not be asked for blocks that this engine never had, a
            miss of 0 tokens; None if all tiers were asked.
        reach_s: how far back the engine remembers which blocks it had, in seconds; None for since
            it started.
        prompts: the report on each prompt of a request with several, of which this is the sum.
        divergence: where the tokens of the prompt and of its ancestor's diverge; None if that is
            not known.
        memory_wait_s: how long it waited for room in the CPU tier, in seconds; 0 if it did not.
    """

    prompt_tokens: int
    read_tokens: int
    block_tokens: int
    misses: tuple[CacheMiss, ...] = ()
    shared_tokens: int | None = None
    source: PrefixSource | None = None
    began: float = 0.0
    engine: EngineId | None = None
    unasked: CacheMiss | None = None
    reach_s: float | None = None
    prompts: tuple["EngineReport", ...] = ()
    divergence: MeasuredDivergence | None = None
    memory_wait_s: float = 0.0


def attribute_misses(
    report: EngineReport,
    read: int,
    shared: int,
    covered: int | None,
    exact: bool,
    own: int = 0,
) -> list[CacheMiss]:
    """Put each of the tokens from ``read`` to ``shared`` down to one cause.

    The engine's misses come first, from the front on. The edge of a block, the breakpoints and the
    engine that had computed the tokens explain further ones. The rest is `MissCause.UNKNOWN`.
    Where ``shared`` is an estimate, tokens within its error have no cause.

    Args:
        report: what the engine found.
        read: leading tokens that were read.
        shared: leading tokens that should have been there.
        covered: leading tokens that a breakpoint covered when they were computed, in whole blocks;
            None if unknown.
        exact: whether ``shared`` is exact.
        own: about how many tokens at the end of the prompt no earlier request had. Where history is
            rendered differently, its length in an earlier prompt does not tell.
    """
    source, block = report.source, report.block_tokens
    engine: list[CacheMiss] = []
    behind: list[CacheMiss] = []  # of the tokens at the end, which come after those of `engine`
    end = max(read, shared)
    if source is not None:
        # The requests are equal up to `end` and their tokens are not: the template rendered the
        # same messages in another way.
        same = max(read, source.shared_tokens)
        if end - end % source.prompt.tokens.step > same:
            rerendered = max(0, report.prompt_tokens - own - same)
            behind.append(CacheMiss(MissCause.RENDERED_DIFFERENTLY, rerendered))
            end = same
    left = end - read
    if left and end < block:
        return [_never_stored(left, f"shorter than one block of {block} tokens"), *behind]
    # Only whole blocks are cached, and a prompt's last one is always computed: the answer starts
    # from its last token.
    edge = end % block or (block if end == report.prompt_tokens else 0)
    if exact or left < block:
        edge = min(left, edge if exact else left)
        behind.insert(0, CacheMiss(MissCause.PARTIAL_BLOCK, edge))
        left -= edge
        end -= edge
    for miss in report.misses:
        if tokens := min(miss.tokens, left):
            # Tokens that no breakpoint covered are kept on the device alone. Their eviction is put
            # down to the missing breakpoint.
            uncovered = 0
            if covered is not None and miss.cause is MissCause.EVICTED and not miss.detail:
                uncovered = min(tokens, max(0, end - left + tokens - covered))
            if tokens > uncovered:
                engine.append(replace(miss, tokens=tokens - uncovered))
            if uncovered:
                engine.append(_never_stored(uncovered, _UNCOVERED))
            left -= tokens
    if source is not None and source.unleft is not None:
        unleft = min(left, max(0, end - source.left_tokens))
        behind.insert(0, replace(source.unleft, tokens=unleft))
        left -= unleft
        end -= unleft
    if covered is not None and not _elsewhere(report):
        uncovered = min(left, max(0, end - covered))
        engine += [_never_stored(uncovered, _UNCOVERED)] if uncovered else []
        left -= uncovered
    if left and source is not None and (why := _cause_elsewhere(report, source, left)) is not None:
        engine.append(why)
        left = 0
    if left and not exact:
        # Within the estimate's error: the shared prefix is a little shorter than estimated.
        slack = min(left, round(shared * _ESTIMATE_ERROR) + block)
        left = 0 if left == slack else left
    if left:
        engine.append(CacheMiss(MissCause.UNKNOWN, left))
    return engine + [miss for miss in behind if miss.tokens]


def _never_stored(tokens: int, detail: str) -> CacheMiss:
    return CacheMiss(MissCause.NEVER_STORED, tokens, detail=detail)


def _elsewhere(report: EngineReport) -> bool:
    """Whether another engine's own memory held the tokens, and no tier that this one shares."""
    if report.source is None or report.engine is None or report.engine.tiers:
        return False
    return _is_other(report.engine, report.source.prompt)


def _is_other(engine: EngineId, prompt: ComputedPrompt) -> bool:
    """Whether another engine has computed a prompt."""
    other = prompt.engine
    return bool(prompt.replica) or (engine.rank, engine.epoch) != (other.rank, other.epoch)


def _cause_elsewhere(report: EngineReport, source: PrefixSource, tokens: int) -> CacheMiss | None:
    """Return why the engine knows nothing of tokens that were computed once; None if it should."""
    here, there, replica = report.engine, source.prompt.engine, source.prompt.replica
    assert here is not None
    if _is_other(here, source.prompt):
        if report.unasked is not None:
            return replace(report.unasked, tokens=tokens)
        if here.tiers and here.hashing != there.hashing:
            return CacheMiss(MissCause.HASH_SETTINGS_DIFFER, tokens)
        names = " and ".join(here.tiers)
        no_copy = f"{names} had no copy of it" if names else ""
        if replica:
            cause, where = MissCause.OTHER_REPLICA, f"it was on replica {replica}"
        elif here.rank == there.rank:
            cause, where = MissCause.ENGINE_RESTARTED, ""
        else:
            cause, where = MissCause.OTHER_REPLICA, f"it was on engine {there.rank}"
        detail = ", and ".join(filter(None, (where, no_copy)))
        return CacheMiss(cause, tokens, detail=detail or None, replica=replica or None)
    if here.hashing != there.hashing:
        # One engine changes its settings in nothing else.
        detail = "the LoRA adapter was replaced"
        return CacheMiss(MissCause.HASH_SETTINGS_DIFFER, tokens, detail=detail)
    idle_s = report.began - source.prompt.used_at
    if report.reach_s is None or idle_s <= report.reach_s:
        return None
    # The engine no longer remembers what became of the blocks. Past their lifetime they have
    # expired; before its end they can only have been evicted.
    if idle_s > source.prompt.ttl_s:
        age_s = idle_s - source.prompt.ttl_s
        return CacheMiss(MissCause.EXPIRED, tokens, ttl_s=source.prompt.ttl_s, age_s=age_s)
    return CacheMiss(MissCause.EVICTED, tokens, detail="too long ago to be remembered")


def uncached_by_cause(
    diagnosis: Diagnosis, read: int, engine: Iterable[CacheMiss]
) -> tuple[tuple[str, int], ...]:
    """Return how many tokens were not read, by cause.

    Args:
        diagnosis: the diagnosis; its ``uncached`` is not looked at.
        read: leading tokens that were read.
        engine: the misses that `attribute_misses` returns.
    """
    causes: dict[str, int] = {}
    left = diagnosis.prompt_tokens - read
    for miss in engine:
        causes[miss.cause] = causes.get(miss.cause, 0) + miss.tokens
        left -= miss.tokens
    whole = diagnosis.kind in (DiagnosisKind.FIRST_REQUEST, DiagnosisKind.NEW_LINEAGE)
    own = left if whole else min(left, diagnosis.missed_tokens)
    if own > 0:
        causes[diagnosis.kind] = causes.get(diagnosis.kind, 0) + own
        left -= own
    if left > 0:
        causes[NEW_CONTENT] = left
    return tuple(causes.items())
