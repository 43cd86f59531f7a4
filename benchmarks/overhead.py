"""What the plugin costs where it has nothing to save: prompts of 8,000 tokens that the device
cache holds, on plain vLLM, on vLLM that offloads to memory by itself, and on vLLM with the plugin,
side by side. The second is the floor: the plugin is built on that offloading.

Each round is three servers just started: how the memory of a process happens to be laid out makes
one some percent faster or slower than another of its kind, for as long as it runs.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
import psutil

from benchmarks import plain_offloading
from benchmarks.harness import BLOCK, Result, arguments, console, finish, in_turn, prompt, server
from demo.client import MODEL
from demo.server import Server

PROMPTS = 4
BATCH = 16
CONCURRENCY = 4
OUTPUT_TOKENS = 8
TRIES = 6
"""Requests of which the fastest counts: whatever disturbs one only makes it slower."""
BATCHES = 3

MEMORY_BYTES = 2**28
"""Of the memory behind the device, in bytes, where there is one."""

FLOOR, PLUGIN = "vLLM's offloading", "plugin"


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
def filled(*servers: Server, first: int = 0) -> Iterator[tuple[Client, ...]]:
    """Start servers and have all prompts in their caches; stop them at the end.

    Args:
        servers: the servers.
        first: which one starts first, as if they began again after the last: one that starts
            before others may be some percent slower or faster for as long as it runs.
    """
    first %= len(servers)
    with ExitStack() as stack:
        for one in (*servers[first:], *servers[:first]):
            stack.enter_context(one)
        clients = tuple(Client(one, bodies()) for one in servers)
        for client in clients:
            client.fill()
        yield clients


def compare_timings(clients: Sequence[Client]) -> list[Timing]:
    """Return how long a request takes each server, each prompt's fastest of `TRIES`; the mean over
    all prompts."""

    def asking(client: Client) -> Callable[[int], Timing]:
        return lambda number: client.ask(number // TRIES)

    return [
        Timing(
            _fastest([timing.first_s for timing in timings]),
            _fastest([timing.last_s for timing in timings]),
        )
        for timings in in_turn(TRIES * PROMPTS, [asking(client) for client in clients])
    ]


def compare_rates(clients: Sequence[Client]) -> list[Rate]:
    """Return the mean rate of each server over `BATCHES` batches."""

    def batching(client: Client) -> Callable[[int], Rate]:
        return lambda number: client.batch()

    return [
        Rate(
            statistics.harmonic_mean([rate.requests_per_s for rate in rates]),
            statistics.fmean([rate.cpu_s for rate in rates]),
        )
        for rates in in_turn(BATCHES, [batching(client) for client in clients])
    ]


def add_rates(
    result: Result, rates: Sequence[Sequence[Rate]], one: str, other: str, least: float
) -> None:
    """Add the throughput of two kinds of servers to ``result``.

    Args:
        result: where to.
        rates: the rates of pairs of them.
        one, other: what to call them.
        least: the least that the second's throughput may be of the first's.
    """
    for at, name in enumerate((one, other)):
        result.add(f"throughput, {name}", [pair[at].requests_per_s for pair in rates], "requests/s")
    add_ratios(result, rates, one, other, least)


def add_ratios(
    result: Result,
    rates: Sequence[Sequence[Rate]],
    one: str,
    other: str,
    least: float | None = None,
) -> None:
    """Add how the throughput of two kinds of servers compares, and the CPU time of a request; see
    `add_rates`. With None as ``least`` nothing is asked of them."""
    result.add(
        f"throughput, {other} over {one}",
        [b.requests_per_s / a.requests_per_s for a, b in rates],
        "×",
        "" if least is None else f"at least {least}",
        None if least is None else lambda ratio: ratio >= least,
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
    console.print("overhead: servers in turn, plain, with vLLM's own offloading, with the plugin")
    timings, rates = [], []
    for number in range(options.pairs):
        offloading = plain_offloading.engine("lru", MEMORY_BYTES)
        plugin = server(plugin=True, cpu_bytes=MEMORY_BYTES)
        with filled(server(plugin=False), offloading, plugin, first=number) as clients:
            timings.append(compare_timings(clients))
            rates.append(compare_rates(clients))
    result.add("a request, plain", [1000 * plain.last_s for plain, *_ in timings], "ms")
    result.add("its first token, plain", [1000 * plain.first_s for plain, *_ in timings], "ms")
    for at, name in ((1, FLOOR), (2, PLUGIN)):
        last_ms = [1000 * (run[at].last_s - run[0].last_s) for run in timings]
        first_ms = [1000 * (run[at].first_s - run[0].first_s) for run in timings]
        result.add(f"added to a request, {name}", last_ms, "ms")
        name = f"added to its first token, {name}"
        if at == 1:
            result.add(name, first_ms, "ms")
        else:
            result.add(name, first_ms, "ms", "at most 1 ms", lambda added: added <= 1)
    for at, name in enumerate(("plain", FLOOR, PLUGIN)):
        result.add(f"throughput, {name}", [run[at].requests_per_s for run in rates], "requests/s")
    add_ratios(result, [(run[0], run[1]) for run in rates], "plain", FLOOR)
    add_ratios(result, [(run[0], run[2]) for run in rates], "plain", PLUGIN, least=0.99)
    add_ratios(result, [(run[1], run[2]) for run in rates], FLOOR, PLUGIN)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
