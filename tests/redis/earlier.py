"""A directory with the code of an earlier version, from this clone's own history."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def earlier_tree(make: Callable[[str], Path], commit: str) -> Path:
    """Return a directory with the code of ``commit``, in a new directory from ``make``; skip the
    test where this clone does not go back so far."""
    packed = subprocess.run(
        ["git", "archive", commit, "vllm_cachescope", "connectors", "tests", "demo"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if packed.returncode:
        pytest.skip(f"this clone does not go back to {commit}")
    path = make("earlier")
    subprocess.run(["tar", "-x"], cwd=path, input=packed.stdout, check=True)
    return path
