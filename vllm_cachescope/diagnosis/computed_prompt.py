"""A prompt as an engine computed it, and what it left for a later prompt that begins alike."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.prefix_hashes import PrefixHashes
from vllm_cachescope.cache.report import EngineId

_UNREADABLE = CacheMiss(
    MissCause.NEVER_STORED, 0, detail="session scope, and the request named no session"
)
_IN_FLIGHT = CacheMiss(
    MissCause.NEVER_STORED, 0, detail="an earlier request was still computing it"
)
_CUT_OFF = CacheMiss(MissCause.CUT_OFF, 0)
_SCOPE_CHANGED = CacheMiss(MissCause.SCOPE_CHANGED, 0)


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """A prompt that an engine computed: what matters to a later prompt that begins alike.

    Attributes:
        tokens: its tokens.
        computed_tokens: leading tokens that were read or computed, in whole blocks: fewer than it
            has where it was cut off.
        blocks: its blocks; None if they are not known.
        covered_tokens: leading tokens that a breakpoint covers.
        readable_tokens: leading tokens that any later request of the session may read.
        ttl_s: the longest lifetime of any of its blocks, in seconds.
        engine: the engine.
        began: when the engine was given the prompt, on the lineage store's clock, in seconds.
        computed_at: when the whole prompt had been computed, or was cut off.
        used_at: when the request was over, and with it the last use of its blocks.
        replica: the name of the server that had it; empty for this one.
    """

    tokens: PrefixHashes
    computed_tokens: int
    blocks: PrefixHashes | None
    covered_tokens: int
    readable_tokens: int
    ttl_s: int
    engine: EngineId
    began: float
    computed_at: float
    used_at: float
    replica: str = ""

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        blocks = len(self.blocks.hashes) if self.blocks else 0
        return 400 + len(self.tokens.hashes) + blocks

    def left_to(self, later: "ComputedPrompt", shared: int) -> tuple[int, CacheMiss | None]:
        """Return how many of the ``shared`` leading tokens it left where ``later`` looked for them;
        and why no more, as a miss of 0 tokens.

        Args:
            later: another prompt.
            shared: leading tokens that both have.
        """
        if self.computed_at > later.began:
            return 0, _IN_FLIGHT
        # A block that later requests may read only in part cannot be read at all.
        readable = self.readable_tokens - self.readable_tokens % self.tokens.step
        limits = [(readable, _UNREADABLE), (self.computed_tokens, _CUT_OFF)]
        if self.blocks and later.blocks and self.engine.hashing == later.engine.hashing:
            same = self.blocks.shared_tokens(later.blocks)
            # Where blocks are the same and their hashes further apart, all is the same.
            step = max(self.blocks.step, later.blocks.step)
            limits.append((shared if same == shared - shared % step else same, _SCOPE_CHANGED))
        left, why = min(limits, key=lambda limit: limit[0])
        return (shared, None) if left >= shared else (left - left % self.tokens.step, why)


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Where a prompt's prefix should have been read from: the earlier prompts that begin alike.

    Attributes:
        prompt: the one that left most of its leading tokens where they were looked for; of several
            the one that is likeliest to have them still.
        left_tokens: how many tokens that is.
        shared_tokens: the most leading tokens that any of them has, in whole steps of both prompts'
            `PrefixHashes`.
        unleft: why those behind ``left_tokens`` were not left, a miss of 0 tokens; None if all
            were.
    """

    prompt: ComputedPrompt
    left_tokens: int
    shared_tokens: int
    unleft: CacheMiss | None = None


def prefix_source(prompt: ComputedPrompt, earlier: Iterable[ComputedPrompt]) -> PrefixSource | None:
    """Return where the prefix of ``prompt`` should have been read from; None if ``earlier`` is
    empty.

    Args:
        prompt: the prompt.
        earlier: other prompts of its session, the likeliest first: others are soon ruled out.
    """
    best: tuple[tuple[int, bool, int, float], ComputedPrompt] | None = None
    nearest: tuple[tuple[int, int], CacheMiss | None] = (-1, 0), None
    for other in earlier:
        at_least = best[0][0] if best else 0
        shared = other.tokens.shared_tokens(prompt.tokens, at_least)
        if shared < at_least:
            continue  # It has left no more than that, and shares less than the best one has left.
        left, why = other.left_to(prompt, shared)
        here = other.engine == prompt.engine and not other.replica
        rank = (left, here, shared, other.used_at)
        if best is None or rank > best[0]:
            best = rank, other
        if (shared, left) > nearest[0]:
            nearest = (shared, left), why
    if best is None:
        return None
    (left, *_), source = best
    (shared, _), why = nearest
    return PrefixSource(source, left, shared, why if left < shared else None)
