"""The engine's report on one prompt: what became of its tokens."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from vllm_cachescope.cache.miss_causes import CacheMiss
from vllm_cachescope.cache.prefix_hashes import PrefixHashes
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Scope


class Outcome(StrEnum):
    """The outcome of a prompt token. Every token has exactly one."""

    READ_DEVICE = "read_device"
    READ_CPU = "read_cpu"
    CREATED = "created"
    UNCACHED = "uncached"


_READ = "read_"  # starts the outcomes of what was read


def tier_read(outcome: str) -> str | None:
    """Return the name of the tier that tokens with ``outcome`` were read from; None if none was."""
    return outcome.removeprefix(_READ) if outcome.startswith(_READ) else None


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one prompt that share an outcome, a scope and a TTL class.

    Attributes:
        outcome: an `Outcome`, or ``read_<tier>`` of a further tier.
        scope: how widely their blocks are shared.
        ttl_s: lifetime of their blocks in seconds; 0 where no breakpoint covers them.
        tokens: how many tokens.
    """

    outcome: str
    scope: Scope
    ttl_s: int
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineId:
    """Which engine a prompt ran on.

    Attributes:
        rank: the engine's number among those behind one API server, from 0.
        epoch: made up when the engine starts. Two epochs of one rank mean that the engine was
            restarted in between, and its device and CPU tier emptied.
        hashing: a digest of the settings that block hashes depend on, and of the prompt's LoRA
            adapter. Engines with different digests find none of each other's blocks in a tier that
            they share.
        tiers: names of the tiers that the engine shares with other engines.
    """

    rank: int
    epoch: str
    hashing: str = ""
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The engine's report on one prompt.

    Attributes:
        rows: the prompt's tokens by outcome, scope and TTL class; they add up to the prompt.
        misses: the tokens behind those that were read, in prompt order, up to the first block
            that this engine has never seen.
        unasked: a miss of 0 tokens that says why a shared tier could not be asked for that block;
            None if all tiers were asked.
        engine: where the prompt ran; None in an estimate, which is made without the engine.
        reach_s: seconds since the oldest eviction that the engine remembers; None if it remembers
            all of them.
        computed_tokens: leading tokens that were read or computed before the prompt was over, fewer
            than it has where it was cut off; None if that is not known.
        blocks: the hashes of its blocks, equal where another prompt could have read them; None if
            they are not known.
        prefill_seconds_saved: seconds that the engine would have taken to compute what was read, at
            the rate that it had measured by then; None while it has measured none.
        memory_wait_s: seconds that the prompt waited for room in the CPU tier for what a remote
            tier holds; None if it did not, or where that is not known.
    """

    rows: tuple[Row, ...]
    misses: tuple[CacheMiss, ...] = ()
    unasked: CacheMiss | None = None
    engine: EngineId | None = None
    reach_s: float | None = None
    computed_tokens: int | None = None
    blocks: PrefixHashes | None = None
    prefill_seconds_saved: float | None = None
    memory_wait_s: float | None = None

    def tokens(self, outcome: str) -> int:
        """Return the tokens with ``outcome``."""
        return sum(row.tokens for row in self.rows if row.outcome == outcome)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return sum(row.tokens for row in self.rows)

    @property
    def read_tokens(self) -> int:
        """Tokens read from any tier."""
        return sum(self.read_by_tier.values())

    @property
    def read_by_tier(self) -> dict[str, int]:
        """Tokens read, by the name of the tier: ``device``, ``cpu``, or that of a further tier."""
        read: Counter[str] = Counter()
        for row in self.rows:
            if (tier := tier_read(row.outcome)) is not None:
                read[tier] += row.tokens
        return dict(read)

    @property
    def created_by_ttl(self) -> dict[int, int]:
        """Tokens newly cached, by TTL in seconds."""
        created: Counter[int] = Counter()
        for row in self.rows:
            if row.outcome == Outcome.CREATED:
                created[row.ttl_s] += row.tokens
        return dict(created)

    @property
    def uncached_tokens(self) -> int:
        """Tokens computed and not cached under a breakpoint."""
        return self.tokens(Outcome.UNCACHED)

    def to_wire(self) -> dict[str, Any]:
        """Return the report as plain data, for the way from the engine to the API process."""
        wire: dict[str, Any] = msgspec.to_builtins(self)
        return wire

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> "Report":
        """Return the report that `to_wire` was called on."""
        return msgspec.convert(data, cls)


def attribute_tokens(
    plan: Plan,
    block_size: int,
    read: Iterable[tuple[str, int]],
    created: Iterable[tuple[int, int]],
) -> Report:
    """Divide a prompt's tokens by outcome, scope and TTL class.

    Args:
        plan: the prompt's plan; its last span ends where the prompt ends.
        block_size: tokens per block.
        read: ``(outcome, tokens)`` of what was read, in prompt order from the first token.
        created: ``(start, end)`` in tokens of what this prompt newly cached under a breakpoint; in
            order, and what overlaps counts once.

    Returns:
        A report with rows and nothing else.
    """
    prompt_tokens = plan.spans[-1].end
    ranges: list[tuple[int, int, str]] = []
    position = 0
    for outcome, tokens in read:
        end = min(position + tokens, prompt_tokens)
        ranges.append((position, end, outcome))
        position = end
    for first, end in created:
        start = max(first, position)
        if start >= end:
            continue
        ranges.append((position, start, Outcome.UNCACHED))
        ranges.append((start, end, Outcome.CREATED))
        position = end
    ranges.append((position, prompt_tokens, Outcome.UNCACHED))

    rows: Counter[tuple[str, Scope, int]] = Counter()
    for span_start, span_end, span in plan.ranges(block_size):
        ttl_s = span.ttl_s if span.covered else 0
        for start, end, outcome in ranges:
            tokens = min(end, span_end) - max(start, span_start)
            if tokens > 0:
                rows[outcome, span.scope, ttl_s] += tokens
    return Report(tuple(Row(*key, tokens) for key, tokens in rows.items()))


def estimate(plan: Plan, block_size: int, read_tokens: int) -> Report:
    """Return what is known of a prompt without the engine's report.

    All tokens that are covered and were not read count as created, though some of their blocks may
    have been there already.

    Args:
        plan: the prompt's plan.
        block_size: tokens per block.
        read_tokens: how many tokens were read, from whatever tier; they count as the device's.
    """
    created = [(read_tokens, plan.covered_tokens // block_size * block_size)]
    return attribute_tokens(plan, block_size, [(Outcome.READ_DEVICE, read_tokens)], created)
