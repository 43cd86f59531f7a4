"""Policy features: what the learned order would read if it looked at more than it does.

Prints the tables of "What was tried and left out" in `docs/policy.md`, as Markdown: each feature as
one more level of a kind, and blocks priced by what they cost to compute. ``--trace`` names a block
trace, and, several times, files of one session each. It takes a quarter of an hour.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.cloned_sessions import agent_load, live_blocks
from benchmarks.policy_tables import CAPACITIES, LOADS, SEEDS
from benchmarks.recorded_traces import TEXT_BLOCK, RecordedTraces
from vllm_cachescope.cache import learned_order, price_fits, prompt_parts
from vllm_cachescope.cache.prompt_parts import parted, parts_of
from vllm_cachescope.cache.return_counts import BINS, Counted, Kind
from vllm_cachescope.cache.return_prices import Prices, fit_prices
from vllm_cachescope.cache.runs import (
    RequestSignals,
    Stretch,
    conversation_kind,
    octave,
    shared_kind,
    stretches,
)
from vllm_cachescope.cli.simulate.traced_calls import traced
from vllm_cachescope.cli.traffic import BLOCK_TOKENS
from vllm_cachescope.simulation.marked_conversations import mark_conversations
from vllm_cachescope.simulation.simulated_cache import LearnedCache
from vllm_cachescope.simulation.traced_request import TracedRequest

_PARTS = (1 / 8, 1 / 3)
_SHARE = 0.2

ATTENTION_TOKENS = 30_000
"""At this depth a token's attention costs as much as all else of it: of a model of 8 billion
parameters with 32 layers of 4,096 (2 operations a parameter; 4 a layer, width and position)."""

_DEPTH_TOKENS = 8192
"""A level of depth is so many tokens where prices are multiplied by cost."""


@dataclass
class Seen:
    """What is at hand when a prompt's blocks get their kinds.

    Attributes:
        keys: the prompt's blocks.
        found: where they were before.
        now: the time in seconds.
        shared: of ``found``, those that prompts part behind and whose kind is still to be made.
        uses: how many prompts have used the run that begins with a block.
    """

    keys: Sequence[bytes] = ()
    found: Sequence[Stretch] = ()
    now: float = 0.0
    shared: list[Stretch] = field(default_factory=list)
    uses: dict[bytes, int] = field(default_factory=dict)

    @property
    def gap_s(self) -> float:
        """How long the conversation had not been used; 0 if it is new."""
        known = [one.run.used_at for one in self.found if one.run is not None]
        return self.now - known[-1] if known else 0.0

    @property
    def known(self) -> int:
        """How many of the prompt's blocks are known."""
        return max((one.end for one in self.found if one.run is not None), default=0)


Level = Callable[[Seen], int]


def _depth(seen: Seen) -> int:
    return octave(seen.known)


def _shared_depth(seen: Seen) -> int:
    return octave(seen.shared[0].end)


def _sharers(seen: Seen) -> int:
    return octave(seen.uses[seen.keys[seen.shared[0].start]])


FEATURES: dict[str, tuple[Level | None, Level | None]] = {
    "as it is": (None, None),
    "depth of the blocks": (_depth, _shared_depth),
    "depth of shared blocks alone": (None, _shared_depth),
    "depth of the blocks, coarsely": (lambda seen: min(octave(seen.known) // 3, 2), None),
    "last gap of the conversation": (lambda seen: octave(seen.gap_s), None),
    "how many prompts share them": (None, _sharers),
}
"""By name, the level that a conversation's blocks get, and shared ones."""


@contextmanager
def looking_at(conversation: Level | None, shared: Level | None) -> Iterator[None]:
    """Have the order look at more: one level for a conversation's blocks, one for shared ones."""
    seen = Seen()

    def seen_stretches(keys: list[bytes], *maps: Any) -> Iterator[Stretch]:
        seen.keys = keys
        return stretches(keys, *maps)

    def seen_parts(
        found: Iterable[Stretch], length: int, now: float, signals: Any, *rest: Any
    ) -> Any:
        seen.found, seen.now = list(found), now
        shared_runs = parted(seen.found, length - signals.ends_partial)
        known = [one for one in seen.found if one.run is not None]
        for one in known:
            key = seen.keys[one.start]
            seen.uses[key] = seen.uses.get(key, 1) + 1
        seen.shared = [one for one in known if one.run in shared_runs]
        return parts_of(seen.found, length, now, signals, *rest)

    def kind_of(turn: int, new_blocks: int, signals: RequestSignals) -> Kind:
        kind = conversation_kind(turn, new_blocks, signals)
        return kind if conversation is None else (*kind, conversation(seen))

    def kind_of_shared(gap_s: float) -> Kind:
        kind = shared_kind(gap_s)
        level = None if shared is None else shared(seen)
        del seen.shared[0]
        return kind if level is None else (*kind, level)

    with ExitStack() as stack:
        for where, name, what in (
            (learned_order, "stretches", seen_stretches),
            (learned_order, "parts_of", seen_parts),
            (prompt_parts, "conversation_kind", kind_of),
            (prompt_parts, "shared_kind", kind_of_shared),
        ):
            stack.enter_context(patch.object(where, name, what))
        yield


@contextmanager
def priced_by_cost(block_tokens: int) -> Iterator[None]:
    """Have prices multiplied by what a block costs to compute at its depth; what is learned is
    learned of all depths together."""

    def level(blocks: int) -> int:
        return blocks * block_tokens // _DEPTH_TOKENS

    def fit(counted: Counted) -> Prices:
        plain = [kind[:-1] if len(kind) > 1 else kind for kind in counted.kinds]
        kinds = tuple(dict.fromkeys(plain))
        rows = np.array([kinds.index(kind) for kind in plain], dtype=np.int64)
        returns, exposure = np.zeros((len(kinds), BINS)), np.zeros((len(kinds), BINS))
        np.add.at(returns, rows, counted.returns)
        np.add.at(exposure, rows, counted.exposure)
        prices = fit_prices(Counted(kinds, returns, exposure))
        if not prices.cells:
            return prices
        depths = [kind[-1] if len(kind) > 1 else 0 for kind in counted.kinds]
        cost = 1 + (np.array(depths) + 0.5) * _DEPTH_TOKENS / ATTENTION_TOKENS
        cells = np.array(prices.cells).reshape(len(kinds), BINS)[rows] * cost[:, None]
        return Prices(cells.ravel().tolist(), prices.other)

    middle: Level = lambda seen: level((seen.known + len(seen.keys)) // 2)  # noqa: E731
    shared: Level = lambda seen: level((seen.shared[0].start + seen.shared[0].end) // 2)  # noqa: E731
    with looking_at(middle, shared), patch.object(price_fits, "fit_prices", fit):
        yield


@contextmanager
def looking_at_ttl(requests: Sequence[TracedRequest]) -> Iterator[None]:
    """Have the order look at the TTL: what is left of it follows from that and the age."""
    ttl_of = {request.keys[-1]: request.ttl_s or 0 for request in requests if request.keys}
    with looking_at(lambda seen: int(ttl_of[seen.keys[-1]] > 300), None):
        yield


def reads(
    requests: Sequence[TracedRequest], capacity: int, block_tokens: int
) -> tuple[float, float]:
    """Return which share of blocks is read, and which of the work to compute all of them that
    saves."""
    cache = LearnedCache(capacity, _SHARE)
    hits = np.zeros(len(requests))
    for number, request in enumerate(requests):
        cache.expire(request.at)
        for key in request.keys:
            if key not in cache:
                break
            hits[number] += 1
        cache.store(request)
    blocks = np.array([len(request.keys) for request in requests])

    def work(count: Any) -> float:
        return float((count + count**2 * block_tokens / 2 / ATTENTION_TOKENS).sum())

    return float(hits.sum() / blocks.sum()), work(hits) / work(blocks)


def _row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _plain(ratio: float) -> str:
    return f"{ratio:.4f}".removeprefix("0")


def main() -> int:
    """Print the tables and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, action="append", required=True)
    parser.add_argument("--feature", choices=list(FEATURES), action="append")
    parser.add_argument("--only", choices=["features", "ttl", "cost"], action="append")
    options = parser.parse_args()
    recorded = RecordedTraces.read(options.trace)
    wanted = options.only or ["features", "ttl", "cost"]
    loads: list[tuple[str, Sequence[TracedRequest], tuple[int, ...], int]] = []
    if recorded.blocks:
        chat = traced(recorded.blocks, BLOCK_TOKENS, None)
        loads.append(("conversations", chat, CAPACITIES, BLOCK_TOKENS))
    for name, load in LOADS.items() if recorded.texts else ():
        for seed in SEEDS:
            clones = agent_load(recorded.texts, load, random.Random(seed))
            live = live_blocks(clones, load.agents)
            clones = [replace(request, org="") for request in clones]
            sizes = tuple(max(1, int(live * part)) for part in _PARTS)
            loads.append((f"{name}, seed {seed}", clones, sizes, TEXT_BLOCK))
    if "features" in wanted:
        for label, requests, sizes, tokens in loads:
            for name in options.feature or FEATURES:
                conversation, shared = FEATURES[name]
                with looking_at(conversation, shared):
                    found = [reads(requests, size, tokens)[0] for size in sizes]
                _row(label, name, *map(_plain, found))
    if "ttl" in wanted and recorded.blocks:
        marked = mark_conversations(chat, 0.2, random.Random(0))
        for name, using in (("as it is", looking_at(None, None)), ("TTL", looking_at_ttl(marked))):
            with using:
                found = [reads(marked, size, BLOCK_TOKENS)[0] for size in CAPACITIES]
            _row("conversations, a fifth 1h", name, *map(_plain, found))
    if "cost" in wanted:
        for label, requests, sizes, tokens in loads:
            for name, using in (
                ("by hits, as it is", looking_at(None, None)),
                ("by work saved", priced_by_cost(tokens)),
            ):
                with using:
                    both = [reads(requests, size, tokens) for size in sizes]
                _row(label, name, *(f"{_plain(hit)} / {_plain(work)}" for hit, work in both))
    return 0


if __name__ == "__main__":
    sys.exit(main())
