"""How soon users who come back all at once are served from files, through a CPU tier that holds one
of their prompts or a few, beside Lifeboat Cache on the same vLLM.

The peer takes part where ``PEERS=FOLDER`` in the environment names the folder of the programs of an
environment with ``vllm`` and ``lifeboatcache`` 0.1.11.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_tiering import CpuTieringSpec
from benchmarks.harness import BLOCK, Result, arguments, console, finish, prompt, server
from demo.client import Answer, AnthropicClient, empty_device_cache
from demo.server import Server

SECRET = "the secret of the benchmarks"
USERS = 6
TOKENS = 2_600
"""Tokens per prompt, about: 20 whole blocks of 1 MiB."""

LEAST_READ = 15_000
"""Of the 15,360 tokens in whole blocks."""

SIZES_MIB = (30, 60, 160)
"""Sizes of the CPU tier; the last one holds all prompts."""


def returning(count: int) -> list[dict[str, Any]]:
    """Return the prompts of ``count`` users."""
    return [prompt(f"returning {number}", number, TOKENS) for number in range(count)]


def ours(directory: Path, mib: int, *arguments: str, **config: Any) -> Server:
    """Return a server with the plugin and LMCache's files in ``directory`` behind it, unless
    ``config`` has other tiers; ``arguments`` are further ones for vLLM."""
    adapter = {"type": "fs_native", "base_path": str(directory)}
    files = {"tiers": [{"type": "lmcache", "adapter": adapter}]}
    return server(True, *arguments, cpu_bytes=f"{mib}MiB", secret=SECRET, **(files | config))


def lifeboat(python: Path, directory: Path, mib: int) -> Server:
    """Return a server with Lifeboat Cache as the tier behind vLLM's own CPU tier."""
    settings = directory / "lifeboat.json"
    settings.write_text(
        json.dumps(
            {
                "dashboard": {"enabled": False},
                "telemetry": {"prometheus": {"enabled": False}},
                "storage": {"fallback_local": {"path": str(directory / "kv")}},
            }
        )
    )
    tier = {"type": "LifeboatTier", "module_path": "lifeboat_cache.integrations.vllm_tier"}
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": CpuTieringSpec.__name__,
            "spec_module_path": CpuTieringSpec.__module__,
            "cpu_bytes_to_use": mib * 2**20,
            "secondary_tiers": [tier | {"lifeboat_config": str(settings)}],
        },
    }
    return server(
        False,
        *("--kv-transfer-config", json.dumps(transfer)),
        python=python,
        environment={
            "VLLM_PLUGINS": "lifeboat",
            "LIFEBOAT_CACHE_HOME": str(directory),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
    )


def peer_python() -> Path | None:
    """Return the interpreter of the environment that has the peer; None if there is none."""
    folder = Path(os.environ.get("PEERS", ""))
    there = os.environ.get("PEERS") and (folder / "lifeboat-cache").exists()
    return folder / "python" if there else None


@dataclass(frozen=True, slots=True)
class Burst:
    """What became of a burst: seconds until the last answer was there, and the answers."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def read(self) -> int:
        """Tokens read by all."""
        return sum(answer.read for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(answer.prompt_tokens for answer in self.answers)


def burst(running: Server, bodies: Sequence[dict[str, Any]], cold: Sequence[str]) -> Burst:
    """Have users come back at once to a server that has forgotten all but its files.

    Raises:
        RuntimeError: if an answer is not that of the cold run.
    """
    empty_device_cache(running.url, connector=True)
    clients = [AnthropicClient(running.url, f"user {number}") for number in range(len(bodies))]
    with ThreadPoolExecutor(len(bodies)) as pool:
        start = time.perf_counter()
        answers = tuple(
            pool.map(lambda client, body: client.ask(body, "s", max_tokens=1), clients, bodies)
        )
        seconds = time.perf_counter() - start
    if [answer.text for answer in answers] != list(cold[: len(answers)]):
        raise RuntimeError("an answer is not that of the cold run")
    return Burst(seconds, answers)


def fill(running: Server, bodies: Sequence[dict[str, Any]], directory: Path) -> list[str]:
    """Have all prompts computed and written to files; return the answers."""
    texts = []
    for number, body in enumerate(bodies):
        answer = AnthropicClient(running.url, f"user {number}").ask(body, "s", max_tokens=1)
        texts.append(answer.text)
    files = -1
    # Whatever a tier writes is there once nothing is added any more.
    while files != (files := sum(1 for _ in directory.rglob("*"))):
        time.sleep(1)
    return texts


def compare(result: Result, count: int, directory: Path, peers: Path, python: Path | None) -> None:
    """Add what a burst reads, and how soon, by the size of the CPU tier."""
    bodies = returning(USERS)
    console.print("burst: storing")
    with ours(directory, 256) as running:
        cold = fill(running, bodies, directory)
    if python is not None:
        with lifeboat(python, peers, 256) as running:
            if fill(running, bodies, peers) != cold:
                raise RuntimeError("the peer answers otherwise")
    for mib in SIZES_MIB:
        console.print(f"burst: {USERS} users and {mib} MiB")
        found: list[Burst] = []
        others: list[Burst] = []
        with ExitStack() as stack:
            mine = stack.enter_context(ours(directory, mib))
            other = None
            if python is not None:
                other = stack.enter_context(lifeboat(python, peers, mib))
            for number in range(count):
                sides = [(mine, found), *([(other, others)] if other is not None else [])]
                for running, bursts in sides if number % 2 == 0 else sides[::-1]:
                    bursts.append(burst(running, bodies, cold))
        result.add(
            f"{mib} MiB: tokens read",
            [float(each.read) for each in found],
            "tokens",
            f"at least {LEAST_READ:,} of {USERS * (TOKENS // BLOCK) * BLOCK:,}",
            lambda tokens: tokens >= LEAST_READ,
        )
        result.add(f"{mib} MiB: until all are served", [1000 * b.seconds for b in found], "ms")
        if others:
            result.add(
                f"{mib} MiB: tokens read, Lifeboat Cache",
                [float(each.read) for each in others],
                "tokens",
            )
            result.add(
                f"{mib} MiB: until all are served, Lifeboat Cache",
                [1000 * each.seconds for each in others],
                "ms",
            )
            # Where all prompts fit nobody waits for room, and none of this is about that.
            is_short = mib < SIZES_MIB[-1]
            result.add(
                f"{mib} MiB: over Lifeboat Cache",
                [a.seconds / b.seconds for a, b in zip(found, others, strict=True)],
                "×",
                "at most 1.1" if is_short else "",
                (lambda ratio: ratio <= 1.1) if is_short else None,
            )


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=5)
    result = Result("burst", options.quick)
    with tempfile.TemporaryDirectory(prefix="cachescope-") as scratch:
        directory, peers = Path(scratch) / "ours", Path(scratch) / "peer"
        for made in (directory, peers):
            made.mkdir()
        compare(result, options.pairs, directory, peers, peer_python())
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
