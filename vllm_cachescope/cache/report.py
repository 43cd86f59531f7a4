"""What happened to one prompt's tokens, as the engine saw it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vllm_cachescope.cache.miss_causes import CacheMiss
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Scope


class Outcome(StrEnum):
    """What became of a prompt token. Every token has exactly one outcome."""

    READ_DEVICE = "read_device"
    READ_CPU = "read_cpu"
    CREATED = "created"
    UNCACHED = "uncached"


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one prompt that share an outcome, a scope and a TTL class.

    Attributes:
        outcome: an `Outcome`, or ``read_<tier>`` of a further tier.
        scope: how widely their blocks are shared.
        ttl_s: lifetime of their blocks in seconds; 0 where no breakpoint covers them.
        tokens: how many.
    """

    outcome: str
    scope: Scope
    ttl_s: int
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineId:
    """Which engine a prompt ran on.

    Attributes:
        rank: its number among the engines behind one API server.
        epoch: made up when it started: another one means that its memory was lost in between.
        hashing: a digest of the settings that block hashes depend on. Engines that differ in it
            find nothing of each other's in a tier that they share.
        tiers: names of the tiers that it shares with other engines.
    """

    rank: int
    epoch: str
    hashing: str = ""
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one prompt.

    Attributes:
        rows: its tokens by outcome, scope and TTL class; they add up to the prompt.
        misses: what it might have read in addition, in prompt order from where it stopped to
            read. They end where the engine has never seen the prompt's tokens.
        unasked: why a shared tier could not be asked for what comes then, with no tokens; None
            if all of them were asked.
        engine: where it ran; None for an estimate, before the engine has said anything.
        reach_s: how long ago the first thing happened that the engine still remembers, in
            seconds; None if it remembers everything.
    """

    rows: tuple[Row, ...]
    misses: tuple[CacheMiss, ...] = ()
    unasked: CacheMiss | None = None
    engine: EngineId | None = None
    reach_s: float | None = None

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
        return sum(row.tokens for row in self.rows if row.outcome.startswith("read_"))

    @property
    def created_by_ttl(self) -> dict[int, int]:
        """Tokens newly cached, by TTL in seconds."""
        created: Counter[int] = Counter()
        for row in self.rows:
            if row.outcome == Outcome.CREATED:
                created[row.ttl_s] += row.tokens
        return dict(created)

    def to_wire(self) -> dict[str, Any]:
        """Return the report as plain data, for the way from the engine to the API."""
        engine = self.engine
        return {
            "rows": [[r.outcome, int(r.scope), r.ttl_s, r.tokens] for r in self.rows],
            "misses": [miss.to_wire() for miss in self.misses],
            "unasked": self.unasked and self.unasked.to_wire(),
            "engine": engine and [engine.rank, engine.epoch, engine.hashing, list(engine.tiers)],
            "reach_s": self.reach_s,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> "Report":
        """Return the report `to_wire` made."""
        unasked, engine = data["unasked"], data["engine"]
        return cls(
            tuple(Row(o, Scope(s), ttl, n) for o, s, ttl, n in data["rows"]),
            tuple(map(CacheMiss.from_wire, data["misses"])),
            CacheMiss.from_wire(unasked) if unasked else None,
            EngineId(engine[0], engine[1], engine[2], tuple(engine[3])) if engine else None,
            data["reach_s"],
        )


def account(
    plan: Plan,
    block_size: int,
    read: Iterable[tuple[str, int]],
    created_blocks: Iterable[int],
) -> Report:
    """Divide a prompt's tokens by outcome, scope and TTL class.

    Args:
        plan: the prompt's plan; its last span ends where the prompt ends.
        block_size: tokens per block.
        read: ``(outcome, tokens)`` of what was read, in prompt order from the first token.
        created_blocks: indices of the blocks that this prompt newly cached under a breakpoint.
    """
    prompt_tokens = plan.spans[-1].end
    ranges: list[tuple[int, int, str]] = []
    position = 0
    for outcome, tokens in read:
        end = min(position + tokens, prompt_tokens)
        ranges.append((position, end, outcome))
        position = end
    for index in sorted(created_blocks):
        start, end = max(index * block_size, position), (index + 1) * block_size
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
            overlap = min(end, span_end) - max(start, span_start)
            if overlap > 0:
                rows[outcome, span.scope, ttl_s] += overlap
    return Report(tuple(Row(*key, tokens) for key, tokens in rows.items()))
