"""What `cachescope report` takes for recorded traffic: time on one core, and memory.

Sessions of agents, interleaved: each call repeats tools, system prompt and history. Once as a few
long ones; once as bodies that have nothing in common, of which every word has to be tokenised; once
as 100,000 calls. No engine is needed.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Result, arguments, finish
from demo.session import agent_session, marked

_MB = 1_000_000


def sessions(
    count: int, turns: int, tools: int, rules: int = 40, side_by_side: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield the calls of sessions, so many at a time taking turns, as a recorder writes them.

    A call has the whole body of its turn. In half of the sessions every fourth call is that of a
    subagent, on another model and with some of the tools.
    """
    at = 1.7e9
    for first in range(0, count, side_by_side):
        seeds = range(first, min(count, first + side_by_side))
        made = [agent_session(seed, turns=turns, tools=tools, rules=rules) for seed in seeds]
        for turn in range(turns):
            for seed, session in zip(seeds, made, strict=True):
                body = {"model": "large", **session.body(turn)}
                if seed % 2 and turn % 4 == 3:
                    body |= {"model": "small", "tools": body["tools"][: tools // 2 + 1]}
                    body["messages"] = body["messages"][-1:]
                at += 1.5
                name = f"session {seed}"
                yield {"timestamp": at, "session_id": name, "body": marked(body)}


def different(words: int, calls: int) -> Iterator[dict[str, Any]]:
    """Yield calls that share nothing, each with so many words, as frequent as those of a language:
    the n-th of 100,000 words comes once where the first comes n times."""
    rng = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(100_000)]
    frequency = list(accumulate(1 / n for n in range(1, len(vocabulary) + 1)))
    for i in range(calls):
        text = " ".join(rng.choices(vocabulary, cum_weights=frequency, k=words))
        yield {
            "timestamp": 1.7e9 + i,
            "session_id": f"session {i}",
            "body": {"model": "m", "messages": [{"role": "user", "content": text}]},
        }


def write(path: Path, calls: Iterator[dict[str, Any]], most: int | None = None) -> tuple[int, int]:
    """Write calls to a file, up to ``most`` bytes. Return how many calls and bytes there are."""
    count = 0
    with path.open("w") as file:
        for call in calls:
            file.write(json.dumps(call) + "\n")
            count += 1
            if most is not None and file.tell() >= most:
                break
        return count, file.tell()


_RUN = """
import os, re, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from vllm_cachescope.cli.main import main
status = main(["report", sys.argv[1], "--price", "3"])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(time.process_time(), peak, file=sys.stderr)
sys.exit(status)
"""


def report(path: Path) -> tuple[float, float]:
    """Run the report on one core. Return its CPU seconds and its largest memory in MB."""
    command = [sys.executable, "-c", _RUN, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = ran.stderr.split()[-2:]
    return float(seconds), int(kilobytes) * 1024 / _MB


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("report", options.quick)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "traffic.jsonl"
        cases = {
            "sessions": lambda: write(path, sessions(16, 100, 12), 50 * _MB),
            "nothing in common": lambda: write(path, different(8000, 2000), 50 * _MB),
        }
        for name, make in cases.items():
            calls, size = make()
            runs = [report(path) for _ in range(options.pairs)]
            result.add(f"{name}: size", [size / _MB], "MB")
            result.add(f"{name}: calls", [calls], "")
            result.add(
                f"{name}: CPU time",
                [seconds for seconds, _ in runs],
                "s",
                "at most 30 s",
                lambda seconds: seconds <= 30,
            )
            result.add(f"{name}: memory", [memory for _, memory in runs], "MB")
        small = 2_000 if options.quick else 20_000
        for count in (small, 5 * small):
            calls, size = write(path, sessions(count // 10, 10, 2, rules=2))
            result.add(f"{calls:,} calls: size", [size / _MB], "MB")
            seconds, memory = report(path)
            result.add(f"{calls:,} calls: CPU time", [seconds], "s")
            result.add(
                f"{calls:,} calls: memory", [memory], "MB", "at most 1 GB", lambda mb: mb <= 1000
            )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
