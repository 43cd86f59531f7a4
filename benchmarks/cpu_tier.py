"""How soon prompts are served from CPU memory, next to the device's own cache, to computing them
again, and to what copying their blocks takes alone."""

import sys
import time

import numpy as np

from benchmarks.harness import BLOCK, Result, arguments, console, finish, prompt, server
from demo.client import Answer, AnthropicClient, empty_device_cache
from demo.model import SMALL

LENGTHS = (5_000, 20_000)
"""Tokens of the prompts, about. The model has positions for 40,960."""

HITS = 3
"""Hits of either kind per pair; their fastest counts, since whatever else runs only ever adds."""

ROW_BYTES = BLOCK * SMALL.kv_heads * SMALL.head_dim * 4
"""Keys, or values, of one block in one layer, in float32."""


def copy_ms(tokens: int) -> float:
    """Return in how many milliseconds the keys and values of a prompt are copied, block by block
    and layer by layer, as the worker does on a CPU; the fastest of `HITS`."""
    rows = tokens // BLOCK * 2 * SMALL.layers
    source = np.ones((rows, ROW_BYTES), np.int8)
    target = np.zeros_like(source)
    times = []
    for _ in range(HITS):
        began = time.perf_counter()
        for row in range(rows):
            target[row] = source[row]
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def _measure(result: Result, client: AnthropicClient, url: str, tokens: int, pairs: int) -> None:
    cold: list[float] = []
    device: list[float] = []
    cpu: list[float] = []
    copies: list[float] = []

    def hit(body: dict, from_cpu: bool, expected: int) -> Answer:
        if from_cpu:
            empty_device_cache(url)
        answer = client.ask(body, "s", max_tokens=1)
        if answer.read != expected:
            raise RuntimeError(f"{answer.read} tokens were read, and not {expected}")
        return answer

    for number in range(pairs):
        body = prompt(f"cpu tier {number}", number, tokens)
        first = client.ask(body, "s", max_tokens=1)
        cold.append(1000 * first.ttft_s)
        whole = (first.prompt_tokens - 1) // BLOCK * BLOCK
        on_device, in_memory = [], []
        for turn in range(HITS):
            # In turn, and the other way round in every other pair.
            for from_cpu in (False, True) if (number + turn) % 2 == 0 else (True, False):
                answer = hit(body, from_cpu, whole)
                (in_memory if from_cpu else on_device).append(1000 * answer.ttft_s)
        device.append(min(on_device))
        cpu.append(min(in_memory))
        copies.append(copy_ms(whole))
    name = f"{tokens:,} tokens"
    result.add(f"{name}: first token, computed", cold, "ms")
    result.add(f"{name}: first token, from the device cache", device, "ms")
    result.add(f"{name}: first token, from the CPU tier", cpu, "ms")
    result.add(f"{name}: the copy alone", copies, "ms")
    result.add(
        f"{name}: CPU tier over device cache",
        [c / d for c, d in zip(cpu, device, strict=True)],
        "×",
        "at most 1.06",
        lambda ratio: ratio <= 1.06,
    )
    result.add(
        f"{name}: device cache and the copy alone over device cache",
        [(c + d) / d for c, d in zip(copies, device, strict=True)],
        "×",
    )
    result.add(
        f"{name}: computed over CPU tier",
        [a / b for a, b in zip(cold, cpu, strict=True)],
        "×",
        "at least 10",
        lambda ratio: ratio >= 10,
    )


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=5)
    result = Result("cpu_tier", options.quick)
    console.print("cpu_tier: one server with the plugin")
    with server(plugin=True, cpu_bytes="2GiB") as running:
        client = AnthropicClient(running.url, "benchmark")
        client.ask(prompt("warm-up"), "s")
        for tokens in LENGTHS:
            _measure(result, client, running.url, tokens, options.pairs)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
