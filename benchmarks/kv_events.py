"""What the order of KV events costs a step: a real engine with a Redis behind it publishes them
while agents' sessions grow, and its scheduler is timed, with what puts the events of its tiers in
order and holds back those that routers could not use yet.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, arguments, finish
from demo.model import MODELS, TINY, build
from tests.engine import in_process
from tests.redis.servers import RedisServer
from vllm_cachescope.config import CONNECTOR, SECRET_VARIABLE

BLOCK = 32
"""Tokens of a block: the smallest on the CPU platform. More blocks, more events."""

SESSIONS, AT_ONCE = 24, 8
FIRST, TURN = 6_000, 600
"""Tokens of a session's first prompt, and what each turn adds."""

TURNS = 4
DEVICE_BLOCKS, CPU_BLOCKS = 2_200, 4_400
"""The device holds a third of the sessions, the CPU tier two thirds."""

MAX_SHARE = 0.01
"""Of the time of a step, what the order of events may take. The model is so small that a step of a
real one is many times as long."""


class Timer:
    """Sums up the time that some functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, timed."""

        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return call

    def timed_steps(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a function that yields, timed while it does, and not in between."""

        def call(*given: Any) -> Iterator[Any]:
            found = function(*given)
            advance = self.timed(lambda: next(found, None))
            while (one := advance()) is not None:
                yield one

        return call


class Watched:
    """An engine whose scheduler is timed.

    Attributes:
        steps: the time of its steps.
        scheduler: of that, the scheduler's.
        events: of that, for all events of the tiers, with vLLM's own part.
        order: of that, for their order and for what is held back.
        told: how many events were told.
        most: the most chunks that were held back at once.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._ids = count()
        self.steps, self.scheduler = Timer(), Timer()
        self.events, self.order = Timer(), Timer()
        self._step = self.steps.timed(llm.step)
        self.told = self.most = 0
        scheduler = llm.engine_core.engine_core.scheduler
        tiers = scheduler.connector._events
        for name in ("schedule", "update_from_output"):
            setattr(scheduler, name, self.scheduler.timed(getattr(scheduler, name)))
        for name in ("take", "collect", "note_loading"):
            setattr(tiers, name, self.events.timed(getattr(tiers, name)))
        tiers._in_order = self.order.timed_steps(tiers._in_order)
        self._orphans = tiers._orphans
        self._hold = self.order.timed(self._orphans.told)
        self._orphans.told = self._counted

    def _counted(self, happened: Any) -> list[Any]:
        found: list[Any] = self._hold(happened)
        self.told, self.most = self.told + len(found), max(self.most, len(self._orphans))
        return found

    def run(self, seed: int) -> None:
        """Have sessions grow turn by turn, some at once."""
        from vllm import SamplingParams

        chance = random.Random(seed)
        shared = _drawn(chance, FIRST // 2)
        sessions = [shared + _drawn(chance, FIRST // 2) for _ in range(SESSIONS)]
        sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        for _ in range(TURNS):
            chance.shuffle(sessions)
            for start in range(0, SESSIONS, AT_ONCE):
                for tokens in sessions[start : start + AT_ONCE]:
                    tokens += _drawn(chance, TURN)
                    prompt = {"prompt_token_ids": list(tokens)}
                    self._llm.add_request(str(next(self._ids)), prompt, sampling)
                while self._llm.has_unfinished_requests():
                    self._step()


def _drawn(chance: random.Random, tokens: int) -> list[int]:
    return chance.choices(range(300, 2048), k=tokens)


def engine(redis: RedisServer, scratch: Path) -> Any:
    """Return an engine in this process that publishes KV events."""
    os.environ[SECRET_VARIABLE] = "the secret of the benchmarks"
    block_bytes = BLOCK * 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4
    config = {
        "cpu_bytes": CPU_BLOCKS * block_bytes,
        "tiers": [{"type": "redis", "url": redis.url, "load_deadline": "5s"}],
    }
    options: dict[str, Any] = {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": config,
        },
        "kv_events_config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"ipc://{scratch / 'events'}",
        },
    }
    return in_process.start(
        build(MODELS / TINY.name, TINY),
        block_size=BLOCK,
        max_model_len=16_384,
        max_num_batched_tokens=2_048,
        max_num_seqs=AT_ONCE,
        num_gpu_blocks_override=DEVICE_BLOCKS + 1,
        **options,
    )


def main() -> int:
    """Run the benchmark; return 1 if the target was missed."""
    options = arguments(__doc__.split("\n\n")[0], pairs=3)
    result = Result("kv_events", options.quick)
    found: list[list[float]] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        llm = engine(stack.enter_context(closing(RedisServer(scratch))), scratch)
        stack.callback(llm.engine_core.shutdown)
        watched = Watched(llm)
        for seed in range(options.pairs):
            timers = watched.steps, watched.scheduler, watched.events, watched.order
            before = [timer.seconds for timer in timers]
            steps = -watched.steps.calls
            watched.run(seed)
            steps += watched.steps.calls
            found.append(
                [(timer.seconds - s) / steps for timer, s in zip(timers, before, strict=True)]
            )
    step, scheduler, events, order = zip(*found, strict=True)
    for name, seconds in (
        ("a step", step),
        ("of that the scheduler", scheduler),
        ("of that all for events of the tiers", events),
        ("of that their order", order),
    ):
        result.add(name, [1e6 * one for one in seconds], "µs")
    asked = f"at most {MAX_SHARE}"
    shares = [part / whole for part, whole in zip(order, step, strict=True)]
    result.add("their order, of a step", shares, "×", asked, lambda share: share <= MAX_SHARE)
    shares = [part / whole for part, whole in zip(order, scheduler, strict=True)]
    result.add("the same, of the scheduler's time", shares, "×")
    result.add("events told", [watched.told / options.pairs], "a round")
    result.add("chunks held back at once, at most", [watched.most], "chunks")
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
