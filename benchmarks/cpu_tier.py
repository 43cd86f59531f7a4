"""How soon a prompt of 8,000 tokens is served from CPU memory, next to the device's own cache and
to computing it again."""

import sys

from benchmarks.harness import BLOCK, Result, arguments, console, finish, prompt, server
from demo.client import Answer, AnthropicClient, empty_device_cache

HITS = 3
"""Hits of either kind per pair; their fastest counts, since whatever else runs only ever adds."""


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=7)
    result = Result("cpu_tier", options.quick)
    cold: list[float] = []
    device: list[float] = []
    cpu: list[float] = []
    console.print("cpu_tier: one server with the plugin")
    with server(plugin=True, cpu_bytes="1GiB") as running:
        client = AnthropicClient(running.url, "benchmark")

        def hit(body: dict, from_cpu: bool, expected: int) -> Answer:
            if from_cpu:
                empty_device_cache(running.url)
            answer = client.ask(body, "s", max_tokens=1)
            if answer.read != expected:
                raise RuntimeError(f"{answer.read} tokens were read, and not {expected}")
            return answer

        client.ask(prompt("warm-up"), "s")
        for number in range(options.pairs):
            body = prompt(f"cpu tier {number}", number)
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

    result.add("first token, computed", cold, "ms")
    result.add("first token, from the device cache", device, "ms")
    result.add("first token, from the CPU tier", cpu, "ms")
    result.add(
        "CPU tier over device cache",
        [c / d for c, d in zip(cpu, device, strict=True)],
        "×",
        "at most 1.25",
        lambda ratio: ratio <= 1.25,
    )
    result.add(
        "computed over CPU tier",
        [a / b for a, b in zip(cold, cpu, strict=True)],
        "×",
        "at least 10",
        lambda ratio: ratio >= 10,
    )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
