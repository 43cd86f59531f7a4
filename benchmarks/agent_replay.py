"""Eight tenants' agents at once, with memory for a third of what they use: tokens computed, time to
the first token and time in all, beside what else caches prompts in the same memory."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from transformers import AutoTokenizer

from benchmarks import agent_load, plain_offloading
from benchmarks.agent_load import Call, Outcome
from benchmarks.harness import BLOCK, Result, arguments, console, finish, server
from benchmarks.peer import LMCacheServer
from demo.client import MODEL, Answer
from demo.model import MODELS, SMALL, build
from demo.server import Server
from demo.session import to_chat

BLOCK_BYTES = BLOCK * 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 4
"""Keys and values of one block, in float32."""

MEMORY_SHARE = 1 / 3
"""Of the blocks in use, how many fit into the device and the memory behind it together."""

DEVICE_SHARE = 0.3
"""Of these, how many are the device's."""

LONGEST = 10_000
"""The longest prompt, in tokens: the device has to hold it with what it computes."""

TARGETS, LEAST = ("tokens computed", "first token, median"), 1.5
"""Of which figures the best peer is to have how many times as much."""

OURS = "CacheScope"


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


def asking(url: str, side: Side) -> Callable[[Call], Answer]:
    """Return what puts a call to a server and streams the answer."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))

    def ask(call: Call) -> Answer:
        chat = to_chat(call.body)
        if side.name != OURS:
            chat = json.loads(json.dumps(chat), object_hook=_unmarked)
        body = {
            **{"model": MODEL, "max_tokens": 8, "temperature": 0.0, "stream": True},
            **{"stream_options": {"include_usage": True}, **chat, **side.extra(call)},
        }
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
    return *blocks, "--max-model-len", str(LONGEST)


@contextmanager
def _lmcache(memory: int, *arguments: str) -> Iterator[Server]:
    with (
        LMCacheServer(memory_gb=memory / (1 << 30)) as storage,
        storage.engine(*arguments) as engine,
    ):
        yield engine


def sides(blocks: int) -> list[Side]:
    """Return all ways to serve, in the same memory.

    Args:
        blocks: how many blocks device and memory hold together.
    """
    device = max(int(DEVICE_SHARE * blocks), LONGEST // BLOCK + 8)
    memory = (blocks - device) * BLOCK_BYTES
    return [
        Side("plain vLLM, all on the device", lambda: server(False, *_blocks(blocks))),
        Side(
            "plain vLLM, cache_salt per tenant",
            lambda: server(False, *_blocks(blocks)),
            lambda call: {"cache_salt": call.tenant},
        ),
        Side(
            "vLLM's tiering, LRU", lambda: plain_offloading.engine("lru", memory, *_blocks(device))
        ),
        Side(
            "vLLM's tiering, ARC", lambda: plain_offloading.engine("arc", memory, *_blocks(device))
        ),
        Side("LMCache's server", lambda: _lmcache(memory, *_blocks(device))),
        Side(
            OURS,
            lambda: server(True, *_blocks(device), cpu_bytes=memory),
            lambda call: {"prompt_cache_key": call.session},
        ),
    ]


def _report(result: Result, measured: list[Side]) -> None:
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
    for figure, by_side in figures.items():
        for name, values in by_side.items():
            result.add(f"{figure}: {name}", values, units[figure])
        ours = by_side.pop(OURS)
        best = [min(run) for run in zip(*by_side.values(), strict=True)]
        ratios = [peer / own for peer, own in zip(best, ours, strict=True)]
        name = f"{figure}: the best peer over {OURS}"
        if figure in TARGETS:
            result.add(name, ratios, "×", f"at least {LEAST}", lambda ratio: ratio >= LEAST)
        else:
            result.add(name, ratios, "×")


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=3)
    result = Result("agent_replay", options.quick)
    size = {"tenants": 3, "agents_each": 2, "turns": 4} if options.quick else {}
    tokenizer = AutoTokenizer.from_pretrained(str(build(MODELS / SMALL.name, SMALL)))
    loads = [agent_load.agents(seed, **size) for seed in range(options.pairs)]
    in_use = agent_load.working_set(loads[0], tokenizer)
    blocks = max(int(MEMORY_SHARE * in_use), 2 * (LONGEST // BLOCK + 8))
    measured = sides(blocks)
    console.print(f"agent_replay: {len(measured)} servers in turn, {blocks} of {in_use} blocks")
    for number, load in enumerate(loads):
        # Another one comes first each time.
        first = number % len(measured)
        for side in [*measured[first:], *measured[:first]]:
            with side.start() as running:
                side.outcomes.append(agent_load.replay(load, asking(running.url, side)))
    _report(result, measured)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
