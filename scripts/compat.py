"""``make compat``: runs the tests that every supported vLLM must pass, and prints a table.

Each line is one run of pytest in an environment of one vLLM. 0.31 and 0.32 have CPU builds; of
0.33 the Python runs on the compiled parts of 0.32 (`scripts/graft_engine.py`).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Engine:
    """A vLLM to run on.

    Attributes:
        version: its version.
        venv: the environment's directory.
        setup: arguments of ``scripts/setup.sh`` that make the environment.
        kind: what of it is real here.
    """

    version: str
    venv: str
    setup: tuple[str, ...]
    kind: str


ENGINES = (
    Engine("0.31.0", ".venv-0.31", ("--engine", "0.31.0"), "CPU build"),
    Engine("0.32.0", ".venv", (), "CPU build"),
    Engine("0.33.0", ".venv-0.33", ("--graft", "0.33.0"), "its Python on 0.32's kernels"),
)

SUITES = {
    "hooks": ("tests/compat",),
    "engine": (
        "tests/engine/test_expiry.py",
        "tests/engine/test_isolation.py",
        "tests/engine/test_quotas.py",
        "tests/engine/test_purge.py",
        "tests/engine/test_exactness.py",
        "tests/engine/test_offline.py",
    ),
    "server": (
        "tests/engine/test_boundaries.py",
        "tests/engine/test_diagnostics.py",
        "tests/engine/test_operations.py",
        "tests/engine/test_sdk.py",
    ),
    "redis": ("tests/redis/test_replicas.py", "tests/redis/test_exclusive.py", "tests/routers"),
    "fleet": (
        "tests/redis/test_fleet_purges.py",
        "tests/redis/test_fleet_breaks.py",
        "tests/redis/test_moved_requests.py",
        "tests/redis/test_moved_counts.py",
        "tests/redis/test_moves.py",
        "tests/redis/test_session_notes.py",
        "tests/disk/test_session_notes.py",
    ),
    "front ends": ("tests/frontends/test_gateway.py", "tests/frontends/test_rust.py"),
    "lmcache": ("tests/lmcache/test_engines.py",),
}
"""Tests by what they drive. Each suite is a process of its own: one process has one engine."""


def main() -> int:
    """Run what the arguments choose; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="of these versions only")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    arguments = parser.parse_args()
    table = Table("vLLM", "runs as", *arguments.suites, "minutes")
    failed = False
    for engine in ENGINES:
        if arguments.only and engine.version not in arguments.only:
            continue
        started = time.monotonic()
        subprocess.run(
            [ROOT / "scripts/setup.sh", "--venv", engine.venv, *engine.setup], check=True
        )
        outcomes = [run(engine, SUITES[suite]) for suite in arguments.suites]
        failed = failed or any("failed" in outcome or "error" in outcome for outcome in outcomes)
        minutes = f"{(time.monotonic() - started) / 60:.1f}"
        table.add_row(engine.version, engine.kind, *outcomes, minutes)
    if (valkey := shutil.which("valkey-server")) is not None and not arguments.only:
        outcome = run(ENGINES[1], ("tests/redis",), {"REDIS_SERVER": valkey})
        failed = failed or "failed" in outcome or "error" in outcome
        Console().print(f"Valkey: {outcome}")
    Console(width=140 if not sys.stdout.isatty() else None).print(table)
    return int(failed)


def run(engine: Engine, tests: tuple[str, ...], environment: dict[str, str] | None = None) -> str:
    """Run ``tests`` on ``engine``; return pytest's own count, such as ``"75 passed"``."""
    command = [f"{engine.venv}/bin/pytest", "-q", *tests]
    print(f"vLLM {engine.version}: {' '.join(command)}", flush=True)
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", ended.stdout.splitlines()[-1])
    if ended.returncode != 0:
        print(ended.stdout[-8000:], flush=True)
        return ", ".join(counts) if any("failed" in c or "error" in c for c in counts) else "error"
    return ", ".join(counts)


if __name__ == "__main__":
    sys.exit(main())
