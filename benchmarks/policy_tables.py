"""Policy tables: those of `docs/policy.md`, as Markdown, from recorded traces.

``--trace`` names a block trace for the tables of conversations, and, several times, files of one
session each for those of agents. ``--table`` chooses some of the tables; each takes minutes.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from benchmarks.cloned_sessions import AgentLoad, agent_load, live_blocks
from benchmarks.recorded_traces import TEXT_BLOCK, RecordedTraces
from vllm_cachescope.cache import prompt_parts
from vllm_cachescope.cache.return_counts import Kind
from vllm_cachescope.cache.runs import RequestSignals, conversation_kind, octave
from vllm_cachescope.cli.simulate.traced_calls import traced, whole_blocks
from vllm_cachescope.cli.traffic import BLOCK_TOKENS
from vllm_cachescope.simulation.marked_conversations import LONG_TTL_S, mark_conversations
from vllm_cachescope.simulation.policies import make_cache
from vllm_cachescope.simulation.replay import Outcome, replay
from vllm_cachescope.simulation.simulated_cache import ExpiringLru, SimulatedCache
from vllm_cachescope.simulation.traced_request import TracedRequest

CAPACITIES = (1000, 5000, 10_000, 20_000)
PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
LOADS = {
    "24 at once, with pauses": AgentLoad(24, 300, pause_chance=0.08, pause_s=120.0),
    "48 at once, without": AgentLoad(48, 400),
}
SEEDS = (1, 2)
POLICIES = ("lru", "arc", "s3-fifo")

Requests = Sequence[TracedRequest]
KindOf = Callable[[int, int, RequestSignals], Kind]

_SHARE = 0.2


def _without(*features: int) -> KindOf:
    """Return `conversation_kind` without some of its features, named by their place."""

    def kind_of(turn: int, new_blocks: int, signals: RequestSignals) -> Kind:
        kind = conversation_kind(turn, new_blocks, signals)
        return tuple(-2 if place in features else level for place, level in enumerate(kind))

    return kind_of


def _finely(turn: int, new_blocks: int, signals: RequestSignals) -> Kind:
    group, _, _, _, ended = conversation_kind(turn, new_blocks, signals)
    output = -1 if signals.output_tokens is None else octave(signals.output_tokens)
    return group, min(turn, 7), min(octave(new_blocks), 9), output, ended


ABLATIONS: dict[str, KindOf] = {
    "none: age alone, and whether prompts part behind it": _without(1, 2, 3),
    "turn": _without(2, 3),
    "new blocks": _without(1, 3),
    "turn, answer": _without(2),
    "turn, new blocks": _without(3),
    "new blocks, answer": _without(1),
    "turn, new blocks, answer, each finely": _finely,
    "**turn, new blocks, answer, coarsely: as it is**": conversation_kind,
}


@contextmanager
def _kinds(kind_of: KindOf) -> Iterator[None]:
    with patch.object(prompt_parts, "conversation_kind", kind_of):
        yield


def _cache(policy: str, capacity: int, requests: Requests, share: float) -> SimulatedCache:
    if policy == "lru, blocks expire, too":
        return ExpiringLru(capacity)
    return make_cache(policy, capacity, requests, share)


def _outcomes(policy: str, requests: Requests, share: float = _SHARE) -> list[Outcome]:
    return [
        replay(requests, _cache(policy, capacity, requests, share), BLOCK_TOKENS)
        for capacity in CAPACITIES
    ]


def _row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _head(*cells: str) -> None:
    print()
    _row(*cells)
    _row(*("---",) * len(cells))


def _plain(ratio: float) -> str:
    return f"{ratio:.4f}".removeprefix("0")


def results(requests: Requests) -> None:
    """Print what the production policy reads, with and without last blocks that are not full."""
    _head("policy", *(f"{capacity:,}" for capacity in CAPACITIES))
    for name, of in (("learned", requests), ("whole blocks", list(whole_blocks(requests)))):
        _row(name, *(_plain(outcome.total.ratio) for outcome in _outcomes("learned", of)))


def features(requests: Requests) -> None:
    """Print what each feature of a conversation's blocks contributes."""
    _head("features of a conversation's blocks", *(f"{capacity:,}" for capacity in CAPACITIES))
    for name, kind_of in ABLATIONS.items():
        with _kinds(kind_of):
            _row(name, *(_plain(outcome.total.ratio) for outcome in _outcomes("learned", requests)))


def marks(requests: Requests) -> None:
    """Print what a fifth of conversations marked ``1h`` gains, by `long_share`."""
    marked = mark_conversations(list(requests), 0.2, random.Random(0))
    _head("random fifth of conversations `1h`", "total", "`1h`", "`5m`")
    for policy, share in (
        ("lru", 0.0),
        ("lru, blocks expire, too", 0.0),
        ("lifetime", 0.0),
        *(("learned", n / 10) for n in range(4)),
    ):
        found = _outcomes(policy, marked, share)
        of_ttl = ([one.by_ttl[ttl].ratio for one in found] for ttl in (LONG_TTL_S, 300))
        columns = ([one.total.ratio for one in found], *of_ttl)
        _row(
            f"{policy}, share {share}" if policy == "learned" else policy,
            *(" / ".join(map(_plain, column)) for column in columns),
        )


def agents(recorded: Sequence[Requests]) -> None:
    """Print which share of the optimum is read of agents' loads, told how answers ended and not."""
    _head("load", "policy", *(f"1/{1 / part:.0f}" for part in PARTS))
    for name, load in LOADS.items():
        shares: dict[str, list[list[float]]] = {}
        for seed in SEEDS:
            clones = agent_load(recorded, load, random.Random(seed))
            live = live_blocks(clones, load.agents)
            told = [replace(request, org="") for request in clones]
            untold = [replace(one, signals=replace(one.signals, ended=None)) for one in told]
            best = [_ratio("belady", told, live, part) for part in PARTS]
            rows = [("learned", told), ("learned, not told", untold)]
            for row, of in [*rows, *((policy, told) for policy in POLICIES)]:
                found = [_ratio(row.partition(",")[0], of, live, part) for part in PARTS]
                shares.setdefault(row, []).append(
                    [ratio / most for ratio, most in zip(found, best, strict=True)]
                )
        for row, of_seed in shares.items():
            cells = (
                " ".join(f"{one:.2f}".removeprefix("0") for one in of)
                for of in zip(*of_seed, strict=True)
            )
            _row(name, row, *cells)


def _ratio(policy: str, requests: Requests, live: int, part: float) -> float:
    capacity = max(1, int(live * part))
    return replay(requests, make_cache(policy, capacity, requests, _SHARE), TEXT_BLOCK).total.ratio


CHAT_TABLES = {"results": results, "features": features, "marks": marks}


def main() -> int:
    """Print the tables and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, action="append", required=True)
    parser.add_argument("--table", action="append", choices=[*CHAT_TABLES, "agents"])
    options = parser.parse_args()
    recorded = RecordedTraces.read(options.trace)
    for name, table in CHAT_TABLES.items():
        if recorded.blocks and name in (options.table or CHAT_TABLES):
            table(traced(recorded.blocks, TEXT_BLOCK, None))
    if recorded.texts and "agents" in (options.table or ("agents",)):
        agents(recorded.texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
