"""Eight tenants' agents at once, with memory for a third of what they use: tokens computed, time to
the first token and time in all, beside what else caches prompts in the same memory."""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from transformers import AutoTokenizer

from benchmarks import agent_load, plain_offloading
from benchmarks.agent_load import HURRIED, AgentShape, Blocks, Call, Outcome, Pace
from benchmarks.fleet.load import from_traces
from benchmarks.harness import BLOCK, Result, arguments, console, finish, server
from benchmarks.peer import LMCacheServer
from demo.client import MODEL, Answer
from demo.model import MODELS, SMALL, build
from demo.server import Server
from demo.session import to_chat
from vllm_cachescope.cache.learned_file import write_learned
from vllm_cachescope.cache.return_counts import Counted
from vllm_cachescope.cache.runs import Ended, RequestSignals
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.simulation.belady import Belady
from vllm_cachescope.simulation.replay import replay
from vllm_cachescope.simulation.simulated_cache import LearnedCache
from vllm_cachescope.simulation.traced_request import TracedRequest

BLOCK_BYTES = BLOCK * 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 4
"""Keys and values of one block, in float32."""

MEMORY_SHARES = {"third": 1 / 3, "half": 1 / 2}
"""Of the blocks that sessions use at one time, how many fit into the device and the memory behind
it together."""

DEVICE_SHARE = 0.2
"""Of these, how many are the device's at least."""

LONGEST = 6_500
"""The longest prompt, in tokens: the device has to hold it with what it computes."""

ANSWER = 24
"""Tokens of an answer at most."""

PARSER = "pythonic"
"""Its calls of tools are the shortest: ``[name()]``."""

TENANTS, AGENTS_EACH = 8, 6
SHAPE = AgentShape(turns=12, sessions=2, tools=4, rules=8, pace=Pace(9.0, 90.0, None))

EARLIER = range(1000, 1003)
"""Seeds of the loads that our policy has learned from before, as one has that is restarted."""

TARGETS, LEAST = ("tokens computed", "first token, median"), 1.5
"""Of which figures the best peer is to have how many times as much."""

OURS = "CacheScope, exclusive"
INCLUSIVE = "CacheScope, inclusive"
REFERENCE = "plain vLLM, were all of the memory the device's"
"""No peer: it is what no machine has whose device is full."""


@dataclass(slots=True)
class Side:
    """One way to serve the load.

    Attributes:
        name: what it is called in the table.
        start: makes the server, which runs inside its context.
        extra: what a call's body has besides.
        outcomes: of its runs.
    """

    name: str
    start: Callable[[], AbstractContextManager[Server]]
    extra: Callable[[Call], dict[str, Any]] = lambda call: {}
    outcomes: list[Outcome] = field(default_factory=list)


def answer_of(call: Call) -> str:
    """Return what a call is answered."""
    return f"[{call.tool}()]" if call.tool else "Done."


def asking(url: str, side: Side, is_recorded: bool = False) -> Callable[[Call], Answer]:
    """Return what puts a call to a server and streams the answer.

    Random weights call no tool. A grammar makes the answer say what the session's does, but where
    that is not known.

    Args:
        url: the server's.
        side: what it is.
        is_recorded: whether the calls are of a trace, which has no answers.
    """
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))

    def ask(call: Call) -> Answer:
        chat = to_chat(call.body)
        if side.name not in (OURS, INCLUSIVE):
            chat = json.loads(json.dumps(chat), object_hook=_unmarked)
        body = {
            **{"model": MODEL, "max_tokens": ANSWER, "temperature": 0.0, "stream": True},
            **{"stream_options": {"include_usage": True}, **chat, **side.extra(call)},
        }
        if not is_recorded:
            body["structured_outputs"] = {"choice": [answer_of(call)]}
        headers = {"authorization": f"Bearer key of {call.tenant}"}
        start, ttft_s, usage = time.perf_counter(), None, None
        url_ = f"{url}/v1/chat/completions"
        with client.stream("POST", url_, json=body, headers=headers) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                ttft_s = ttft_s or time.perf_counter() - start
                usage = json.loads(line[6:]).get("usage") or usage
        assert ttft_s is not None and usage is not None, "the answer is empty"
        read = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(ttft_s, "", read, 0, usage["prompt_tokens"] - read)

    return ask


def _unmarked(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("cache_control", None)
    return fields


def _blocks(count: int) -> tuple[str, ...]:
    # One block is vLLM's own.
    blocks = "--num-gpu-blocks-override", str(count + 1)
    return *blocks, "--max-model-len", str(LONGEST), "--tool-call-parser", PARSER


@contextmanager
def _lmcache(memory: int, *arguments: str) -> Iterator[Server]:
    with (
        LMCacheServer(memory_gb=memory / (1 << 30)) as storage,
        storage.engine(*arguments) as engine,
    ):
        yield engine


@contextmanager
def _ours(device: int, memory: int, hierarchy: str, learned: Counted) -> Iterator[Server]:
    with TemporaryDirectory() as directory:
        state_file = Path(directory) / "learned.json"
        write_learned(state_file, learned)
        eviction = {"hierarchy": hierarchy, "device": "learned", "state_file": str(state_file)}
        with server(True, *_blocks(device), cpu_bytes=memory, eviction=eviction) as engine:
            yield engine


def sides(blocks: int, learned: Counted) -> list[Side]:
    """Return all ways to serve on a device and memory behind it.

    Args:
        blocks: how many blocks device and memory hold together.
        learned: what our policy has learned before.
    """
    device = max(int(DEVICE_SHARE * blocks), LONGEST // BLOCK + 10)
    memory = (blocks - device) * BLOCK_BYTES

    def ours(name: str, hierarchy: str) -> Side:
        return Side(
            name,
            lambda: _ours(device, memory, hierarchy, learned),
            lambda call: {"prompt_cache_key": call.session, "session_over": call.ends_session},
        )

    return [
        ours(OURS, "exclusive"),
        Side(
            "vLLM's tiering, ARC", lambda: plain_offloading.engine("arc", memory, *_blocks(device))
        ),
        Side("LMCache's server", lambda: _lmcache(memory, *_blocks(device))),
        ours(INCLUSIVE, "inclusive"),
        Side(
            "vLLM's tiering, LRU", lambda: plain_offloading.engine("lru", memory, *_blocks(device))
        ),
        Side("plain vLLM", lambda: server(False, *_blocks(device))),
        Side(REFERENCE, lambda: server(False, *_blocks(blocks))),
        Side(
            "plain vLLM, cache_salt per tenant",
            lambda: server(False, *_blocks(device)),
            lambda call: {"cache_salt": call.tenant},
        ),
    ]


def _report(result: Result, measured: list[Side], optimum: Sequence[int]) -> None:
    figures: dict[str, dict[str, list[float]]] = {
        "tokens computed": {s.name: [o.computed for o in s.outcomes] for s in measured},
        "first token, median": {
            s.name: [1000 * statistics.median(o.ttft_s) for o in s.outcomes] for s in measured
        },
        "first token, 99th percentile": {
            s.name: [1000 * statistics.quantiles(o.ttft_s, n=100)[98] for o in s.outcomes]
            for s in measured
        },
        "time in all": {s.name: [o.seconds for o in s.outcomes] for s in measured},
    }
    units = dict(zip(figures, ("tokens", "ms", "ms", "s"), strict=True))
    result.add("tokens in prompts", [o.prompts for o in measured[-1].outcomes], "tokens")
    result.add("tokens computed: at least", optimum, "tokens")
    for figure, by_side in figures.items():
        for name, values in by_side.items():
            result.add(f"{figure}: {name}", values, units[figure])
        ours = by_side.pop(OURS)
        peers = [of for name, of in by_side.items() if name not in (INCLUSIVE, REFERENCE)]
        if not peers:
            continue
        best = [min(run) for run in zip(*peers, strict=True)]
        ratios = [peer / own for peer, own in zip(best, ours, strict=True)]
        name = f"{figure}: the best peer over {OURS}"
        if figure in TARGETS:
            result.add(name, ratios, "×", f"at least {LEAST}", lambda ratio: ratio >= LEAST)
        else:
            result.add(name, ratios, "×")


@dataclass(frozen=True, slots=True)
class _Load:
    """The calls of each agent, and what the memory has to do with them.

    Attributes:
        calls: those that are short enough, in order.
        prompts: the blocks and tokens of each.
        output_tokens: by answer, how many tokens it has, with the one that ends it.
    """

    calls: list[list[Call]]
    prompts: list[list[tuple[Blocks, int]]]
    output_tokens: dict[str, int]

    @property
    def working_set(self) -> int:
        """How many blocks sessions use at one time."""
        return agent_load.working_set([[of for of, _ in prompts] for prompts in self.prompts])

    def requests(self, start_s: float = 0.0) -> list[TracedRequest]:
        """Return the calls in the order that their pauses have it, from ``start_s`` on, with what a
        server is told of each."""
        requests: list[TracedRequest] = []
        for calls, prompts in zip(self.calls, self.prompts, strict=True):
            times = itertools.accumulate(call.pause_s for call in calls)
            for at, call, (found, tokens) in zip(times, calls, prompts, strict=True):
                output_tokens = self.output_tokens[answer_of(call)]
                ended = Ended.TOOLS if call.tool else Ended.ANSWER
                requests.append(
                    TracedRequest(
                        start_s + at,
                        tuple(block.to_bytes(8, "big", signed=True) for block in found),
                        tokens,
                        RequestSignals(output_tokens, ended=ended),
                        org=call.tenant,
                        session=call.session,
                        session_over=call.ends_session,
                    )
                )
        return sorted(requests, key=lambda request: request.at)

    def optimum(self, blocks: int) -> int:
        """Return how many tokens have to be computed at least, were all memory one and known what
        comes later."""
        requests = self.requests()
        total = replay(requests, Belady(blocks, requests), BLOCK).total
        return total.tokens - total.hit_tokens


def _load(calls: Sequence[Sequence[Call]], tokenizer: Any) -> _Load:
    """Return a load without the calls that are too long."""
    kept: list[list[Call]] = []
    prompts: list[list[tuple[Blocks, int]]] = []
    for of_agent in calls:
        sized = [(call, agent_load.blocks_of(call.body, tokenizer)) for call in of_agent]
        sized = [(call, prompt) for call, prompt in sized if prompt[1] <= LONGEST - ANSWER]
        kept.append([call for call, _ in sized])
        prompts.append([prompt for _, prompt in sized])
    answers = {answer_of(call) for of_agent in kept for call in of_agent}
    output_tokens = {
        answer: len(tokenizer.encode(answer, add_special_tokens=False)) + 1 for answer in answers
    }
    return _Load(kept, prompts, output_tokens)


def _learned(loads: Sequence[_Load], blocks: int) -> Counted:
    """Return what the policy learns from loads that are replayed, one after the other, in a cache
    of so many blocks."""
    cache, now = LearnedCache(blocks, EvictionSettings().long_share), 0.0
    for load in loads:
        requests = load.requests(now)
        replay(requests, cache, BLOCK)
        now = requests[-1].at
    return cache.order.counted()


def main() -> int:
    """Run the benchmark and return its exit status."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--memory", choices=MEMORY_SHARES, default="third")
    own.add_argument("--trace", type=Path, action="append", default=[])
    own.add_argument(
        "--only", action="append", default=[], help="a server beside ours, by its name"
    )
    chosen, sys.argv[1:] = own.parse_known_args()
    options = arguments(__doc__ or "", pairs=3)
    name = "agent_replay" + ("" if chosen.memory == "third" else f"_{chosen.memory}")
    result = Result(name, options.quick)
    tokenizer = AutoTokenizer.from_pretrained(str(build(MODELS / SMALL.name, SMALL)))
    tenants, each = (3, 2) if options.quick else (TENANTS, AGENTS_EACH)
    shape = replace(SHAPE, sessions=1, pace=HURRIED) if options.quick else SHAPE

    def loads_of(seeds: Iterable[int]) -> list[_Load]:
        return [_load(agent_load.agents(s, tenants, each, shape), tokenizer) for s in seeds]

    if chosen.trace:
        loads = [_load(from_traces(chosen.trace, SHAPE.turns), tokenizer)] * options.pairs
    else:
        loads = loads_of(range(options.pairs))
    in_use = loads[0].working_set
    blocks = max(int(MEMORY_SHARES[chosen.memory] * in_use), 2 * (LONGEST // BLOCK + 10))
    measured = sides(blocks, _learned(loads_of(EARLIER), blocks))
    names = [side.name for side in measured if side.name != OURS]
    if unknown := set(chosen.only) - set(names):
        own.error(f"--only: no {', '.join(sorted(unknown))}; there are {'; '.join(names)}")
    if chosen.only:
        measured = [side for side in measured if side.name in (OURS, *chosen.only)]
    console.print(
        f"{name}: {len(measured)} servers in turn, {sum(map(len, loads[0].calls))} calls, {blocks} "
        f"blocks of memory where sessions use {in_use} at one time"
    )
    for number, load in enumerate(loads):
        # Another one comes first each time.
        first = number % len(measured)
        for side in [*measured[first:], *measured[:first]]:
            with side.start() as running:
                outcome = agent_load.replay(
                    load.calls, asking(running.url, side, bool(chosen.trace))
                )
            side.outcomes.append(outcome)
            console.print(
                f"{side.name}: {outcome.computed:,} of {outcome.prompts:,} tokens computed, first "
                f"token {1000 * statistics.median(outcome.ttft_s):,.0f} ms, "
                f"{outcome.seconds:,.0f} s in all"
            )
    _report(result, measured, [load.optimum(blocks) for load in loads])
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
