"""What the plugin costs where it has nothing to save: prompts of 8,000 tokens that the device
cache holds, on plain vLLM and on vLLM with the plugin, side by side.

Each pair is two servers just started: how the memory of a process happens to be laid out makes one
some percent faster or slower than another of its kind, for as long as it runs.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil

from benchmarks.harness import BLOCK, Result, arguments, console, finish, pairs, prompt, server
from demo.client import MODEL
from demo.server import Server

PROMPTS = 4
BATCH = 16
CONCURRENCY = 4
OUTPUT_TOKENS = 8
TRIES = 6
"""Requests of which the fastest counts: whatever disturbs one only makes it slower."""
BATCHES = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request's first token came, and its last; in seconds from its start."""

    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second, and the CPU time in seconds that each took the server."""

    requests_per_s: float
    cpu_s: float


class Client:
    """Sends ready-made bodies and reads the stream back, with as little work as can be: client
    and servers share the cores.

    Args:
        server: the server.
        bodies: the request bodies.
    """

    def __init__(self, server: Server, bodies: list[bytes]) -> None:
        headers = {"content-type": "application/json", "x-api-key": "benchmark"}
        self._http = httpx.Client(base_url=server.url, timeout=600, headers=headers)
        main = psutil.Process(server.pid)
        self._processes = [main, *main.children(recursive=True)]
        self._bodies = bodies

    def fill(self) -> None:
        """Put every prompt into the cache, and see that it is read from there.

        Raises:
            RuntimeError: if a prompt is not.
        """
        for number in range(len(self._bodies)):
            self.ask(number)
            usage = self._events(number)[-1]["usage"]
            read = usage["cache_read_input_tokens"]
            prompt_tokens = read + usage["input_tokens"] + usage["cache_creation_input_tokens"]
            if read != (prompt_tokens - 1) // BLOCK * BLOCK:
                raise RuntimeError(f"only {read} of {prompt_tokens} tokens came from the cache")

    def ask(self, number: int) -> Timing:
        """Send body ``number``; return when its tokens came."""
        first_s = 0.0
        start = time.perf_counter()
        for line in self._lines(number):
            if not first_s and b"content_block_delta" in line:
                first_s = time.perf_counter() - start
        return Timing(first_s, time.perf_counter() - start)

    def batch(self) -> Rate:
        """Send `BATCH` requests, `CONCURRENCY` at a time."""
        start, busy_s = time.perf_counter(), self._cpu_s()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            list(pool.map(self.ask, (number % len(self._bodies) for number in range(BATCH))))
        elapsed_s = time.perf_counter() - start
        return Rate(BATCH / elapsed_s, (self._cpu_s() - busy_s) / BATCH)

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)

    def _lines(self, number: int) -> Iterator[bytes]:
        with self._http.stream("POST", "/v1/messages", content=self._bodies[number]) as response:
            response.raise_for_status()
            yield from response.iter_raw()

    def _events(self, number: int) -> list[dict]:
        lines = b"".join(self._lines(number)).split(b"\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        return [event for event in events if "usage" in event]


def bodies() -> list[bytes]:
    """Return the bodies, the same for both servers; plain vLLM ignores the breakpoints."""
    fields = {"model": MODEL, "max_tokens": OUTPUT_TOKENS, "stream": True, "temperature": 0}
    return [
        json.dumps({**fields, **prompt(f"overhead {number}", number)}).encode()
        for number in range(PROMPTS)
    ]


@contextmanager
def filled(one: Server, other: Server) -> Iterator[tuple[Client, Client]]:
    """Start two servers and have all prompts in their caches; stop them at the end."""
    with one, other:
        clients = Client(one, bodies()), Client(other, bodies())
        for client in clients:
            client.fill()
        yield clients


def compare_timings(clients: tuple[Client, Client]) -> tuple[Timing, Timing]:
    """Return how long a request takes either server, each prompt's fastest of `TRIES`; the mean
    over all prompts."""
    timings = pairs(
        TRIES * PROMPTS,
        lambda number: clients[0].ask(number // TRIES),
        lambda number: clients[1].ask(number // TRIES),
    )
    first, second = (
        Timing(
            _fastest([timing.first_s for timing in side]),
            _fastest([timing.last_s for timing in side]),
        )
        for side in zip(*timings, strict=True)
    )
    return first, second


def compare_rates(clients: tuple[Client, Client]) -> tuple[Rate, Rate]:
    """Return the mean rate of either server over `BATCHES` batches."""
    rates = pairs(BATCHES, lambda _: clients[0].batch(), lambda _: clients[1].batch())
    first, second = (
        Rate(
            statistics.harmonic_mean([rate.requests_per_s for rate in side]),
            statistics.fmean([rate.cpu_s for rate in side]),
        )
        for side in zip(*rates, strict=True)
    )
    return first, second


def add_rates(
    result: Result, rates: list[tuple[Rate, Rate]], one: str, other: str, least: float
) -> None:
    """Add the throughput of two kinds of servers to ``result``.

    Args:
        result: where to.
        rates: the rates of pairs of them.
        one, other: what to call them.
        least: the least that the second's throughput may be of the first's.
    """
    result.add(f"throughput, {one}", [a.requests_per_s for a, _ in rates], "requests/s")
    result.add(f"throughput, {other}", [b.requests_per_s for _, b in rates], "requests/s")
    result.add(
        f"throughput, {other} over {one}",
        [b.requests_per_s / a.requests_per_s for a, b in rates],
        "×",
        f"at least {least}",
        lambda ratio: ratio >= least,
    )
    # Tells the cost even where other work on the machine blurs the rates.
    result.add(f"CPU time, {other} over {one}", [b.cpu_s / a.cpu_s for a, b in rates], "×")


def _fastest(seconds: list[float]) -> float:
    """Return the mean over all prompts of the fastest of `TRIES` requests each."""
    return statistics.fmean(
        min(seconds[start : start + TRIES]) for start in range(0, len(seconds), TRIES)
    )


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("overhead", options.quick)
    console.print("overhead: pairs of servers, plain and with the plugin")
    timings, rates = [], []
    for _ in range(options.pairs):
        with filled(server(plugin=False), server(plugin=True)) as clients:
            timings.append(compare_timings(clients))
            rates.append(compare_rates(clients))
    plain_ms = [1000 * plain.last_s for plain, _ in timings]
    allowed_ms = max(2.0, 0.02 * statistics.median(plain_ms))
    result.add("a request, plain", plain_ms, "ms")
    result.add("its first token, plain", [1000 * plain.first_s for plain, _ in timings], "ms")
    result.add(
        "added to a request",
        [1000 * (plugin.last_s - plain.last_s) for plain, plugin in timings],
        "ms",
        f"at most {allowed_ms:.1f} ms",
        lambda added: added <= allowed_ms,
    )
    result.add(
        "added to its first token",
        [1000 * (plugin.first_s - plain.first_s) for plain, plugin in timings],
        "ms",
    )
    add_rates(result, rates, "plain", "plugin", least=0.97)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
