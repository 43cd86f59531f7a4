"""Totals of what was used: tokens by what became of them, what they cost, and ratios of these."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cache.report import Outcome
from vllm_cachescope.usage.evictions import PARTS
from vllm_cachescope.usage.prices import Prices, cost_with, cost_without, saved_share
from vllm_cachescope.usage.record import TTL_CLASSES, ttl_class

_READ = "read_"  # starts the outcomes of what was read


@dataclass(slots=True)
class Totals:
    """What some requests used. The counts of tokens are disjoint, and add up to the prompts.

    Attributes:
        uncached: tokens neither read nor created.
        created: tokens newly cached, by each of `TTL_CLASSES`.
        read: tokens read, by tier.
        requests: how many requests; None where they cannot be told apart so far, as by scope. The
            same holds for those that follow.
        breaks: how many of them are breaks.
        missed_tokens: tokens that breaks have cost.
        output_tokens: tokens that were answered.
        prefill_seconds_saved: seconds of prefill that reading has saved.
        evictions: entries that left the device or the CPU tier before their time, by each of
            `evictions.PARTS`.
        cost_without: what the prompts would have cost without caching; None if a price is unknown.
        cost_with: what they cost; None if a price is unknown.
        cost_of_output: what the answers cost; None if a price is unknown.
    """

    uncached: int = 0
    created: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TTL_CLASSES, 0)))
    read: Counter[str] = field(default_factory=Counter)
    requests: int | None = None
    breaks: int | None = None
    missed_tokens: int | None = None
    output_tokens: int | None = None
    prefill_seconds_saved: float | None = None
    evictions: Counter[str] = field(default_factory=Counter)
    cost_without: float | None = 0.0
    cost_with: float | None = 0.0
    cost_of_output: float | None = 0.0

    def add_tokens(self, outcome: str, ttl_s: int, tokens: int, model: str, prices: Prices) -> None:
        """Add tokens of one outcome and TTL in seconds, at the price of ``model``."""
        price = prices.of(model)
        counts: tuple[int, int, Mapping[int, int]]
        if outcome.startswith(_READ):
            self.read[outcome.removeprefix(_READ)] += tokens
            counts = 0, tokens, {}
        elif outcome == Outcome.CREATED:
            self.created[ttl_class(ttl_s)] += tokens
            counts = 0, 0, {ttl_s: tokens}
        else:
            self.uncached += tokens
            counts = tokens, 0, {}
        if not tokens:
            return
        self.cost_without = _sum(self.cost_without, cost_without(price, tokens))
        self.cost_with = _sum(self.cost_with, cost_with(price, *counts))

    def add_requests(
        self,
        requests: int,
        breaks: int,
        missed_tokens: int,
        output_tokens: int,
        prefill_seconds_saved: float,
        model: str,
        prices: Prices,
    ) -> None:
        """Add what is counted of requests besides their prompts' tokens."""
        self.requests = (self.requests or 0) + requests
        self.breaks = (self.breaks or 0) + breaks
        self.missed_tokens = (self.missed_tokens or 0) + missed_tokens
        self.output_tokens = (self.output_tokens or 0) + output_tokens
        self.prefill_seconds_saved = (self.prefill_seconds_saved or 0.0) + prefill_seconds_saved
        if output_tokens:
            price = prices.of(model)
            cost = None if price is None else price.cost_of_output(output_tokens)
            self.cost_of_output = _sum(self.cost_of_output, cost)

    def add_evictions(self, part: str, entries: int) -> None:
        """Add entries that were evicted; ``part`` is one of `evictions.PARTS`."""
        self.requests = self.requests or 0
        self.evictions[part] += entries

    @property
    def read_tokens(self) -> int:
        """Tokens read from any tier."""
        return sum(self.read.values())

    @property
    def created_tokens(self) -> int:
        """Tokens newly cached."""
        return sum(self.created.values())

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return self.uncached + self.created_tokens + self.read_tokens

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompts' tokens that was read; None without any."""
        return _ratio(self.read_tokens, self.prompt_tokens)

    @property
    def fresh_share(self) -> float | None:
        """Share of the prompts' tokens that was neither read nor created; None without any."""
        return _ratio(self.uncached, self.prompt_tokens)

    @property
    def reads_per_write(self) -> float | None:
        """Tokens read for each one created; None if none was created."""
        return _ratio(self.read_tokens, self.created_tokens)

    @property
    def reads_per_fresh(self) -> float | None:
        """Tokens read for each one neither read nor created; None if there was none of these."""
        return _ratio(self.read_tokens, self.uncached)

    def to_dict(self) -> dict[str, Any]:
        """Return the totals as plain data for JSON."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "uncached": self.uncached,
            "created": dict(self.created),
            "read": dict(sorted(self.read.items())),
            "output_tokens": self.output_tokens,
            "hit_rate": _rounded(self.hit_rate),
            "fresh_share": _rounded(self.fresh_share),
            "reads_per_write": _rounded(self.reads_per_write),
            "reads_per_fresh": _rounded(self.reads_per_fresh),
            "breaks": self.breaks,
            "missed_tokens": self.missed_tokens,
            "prefill_seconds_saved": _rounded(self.prefill_seconds_saved),
            **{
                f"evictions_{part}": None if self.requests is None else self.evictions[part]
                for part in PARTS
            },
            "cost_without": _rounded(self.cost_without),
            "cost_with": _rounded(self.cost_with),
            "saved_share": _rounded(saved_share(self.cost_without, self.cost_with)),
            "cost_of_output": None if self.output_tokens is None else _rounded(self.cost_of_output),
        }


def _sum(total: float | None, cost: float | None) -> float | None:
    return None if total is None or cost is None else total + cost


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
