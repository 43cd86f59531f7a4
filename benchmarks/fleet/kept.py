"""Kept runs: what was measured so far, a JSON line each, so that a table of long rows can be made
in several goes, and of one state of the code."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fleet.run import Run

_ROOT = Path(__file__).parents[2]

_CODE = ("vllm_cachescope", "connectors")
"""The second is linked to from the first, and links are not followed."""


def state() -> str:
    """Return what names the state of the package's code: a hash of its files in Python."""
    hashed = hashlib.blake2b(digest_size=6)
    for path in sorted(path for name in _CODE for path in (_ROOT / name).rglob("*.py")):
        hashed.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return hashed.hexdigest()


def add(directory: Path, about: dict[str, Any], name: str, run: Run) -> None:
    """Keep a run of the row of that name, with what it was measured with."""
    directory.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"about": about, "row": name, "run": run.as_dict()}, ensure_ascii=False)
    with (directory / "runs.jsonl").open("a") as kept:
        kept.write(f"{line}\n")


def kept(directory: Path, about: dict[str, Any]) -> Iterator[tuple[str, Run]]:
    """Yield the names of rows with their runs, those of this load and state of the code."""
    path = directory / "runs.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        told = json.loads(line)
        if told["about"] == about:
            yield told["row"], Run.from_dict(told["run"])
