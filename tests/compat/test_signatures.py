"""What CacheScope takes hold of in vLLM is there, under its name and with its parameters.

Checked in the source of the installed vLLM, and of any other whose unpacked wheel
``CACHESCOPE_VLLM_SOURCE`` names: a release for other hardware cannot be run here, but be read.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from vllm_cachescope.connectors.vllm import hooks
from vllm_cachescope.connectors.vllm.findings import Status

SOURCES = {"installed": Path(importlib.util.find_spec("vllm").origin).parent}  # type: ignore[union-attr, arg-type]
if elsewhere := os.environ.get("CACHESCOPE_VLLM_SOURCE"):
    SOURCES["elsewhere"] = Path(elsewhere) / "vllm"

FUNCTIONS = {where: wanted for hook in hooks.HOOKS for where, wanted in hook.functions.items()}
TEXTS = [(file, text) for hook in hooks.HOOKS for file, ts in hook.texts.items() for text in ts]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(
    ("where", "wanted"), FUNCTIONS.items(), ids=[name for _, name in FUNCTIONS]
)
def test_a_function_takes_what_we_give_it(
    source: Path, where: tuple[str, str], wanted: str
) -> None:
    assert hooks.misfit(source, *where, wanted) is None


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("file", "text"), TEXTS)
def test_a_file_still_does_what_we_rely_on(source: Path, file: str, text: str) -> None:
    assert hooks.missing(source, file, text) is None


def test_a_check_names_the_hook_that_does_not_bind(tmp_path: Path) -> None:
    assert {found.status for found in hooks.check(SOURCES["installed"])} == {Status.OK}
    for file in {file for file, _ in (*FUNCTIONS, *TEXTS)}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES["installed"] / file, tmp_path / file)
    pool, renderer = tmp_path / "v1/core/block_pool.py", tmp_path / "renderers/base.py"
    pool.write_text(pool.read_text().replace("def evict_blocks(self, block_ids", "def evict(self"))
    renderer.unlink()
    found = {it.subject: it for it in hooks.check(tmp_path) if it.status is not Status.OK}
    assert {name: it.status for name, it in found.items()} == {
        "hook: device tier": Status.FAILURE,
        "hook: media ids": Status.FAILURE,
        "hook: rendering": Status.WARNING,
    }
    assert "has no BlockPool.evict_blocks" in found["hook: device tier"].found
    assert "found by tokenising" in found["hook: rendering"].found
