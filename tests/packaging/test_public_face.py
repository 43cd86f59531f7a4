"""What users get from the package itself: its version, its command, what Python code calls."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vllm_cachescope
from vllm_cachescope.cli.main import main

BODY = {"model": "m", "system": "It is 2026-11-25T10:00:00Z.", "messages": []}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert vllm_cachescope.__version__ == metadata.version("vllm-cachescope")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", vllm_cachescope.__version__)


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"cachescope {vllm_cachescope.__version__}\n"


def test_the_package_runs_as_the_command(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(json.dumps(BODY))
    command = [sys.executable, "-m", "vllm_cachescope"]
    for arguments, status, says in (
        (["--version"], 0, f"cachescope {vllm_cachescope.__version__}"),
        (["lint", str(path)], 1, "timestamp at system"),
        (["serve", "m", "--set", "cpu_bites=1"], 2, "cpu_bites"),
    ):
        ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert ran.returncode == status and says in ran.stdout + ran.stderr


def test_python_reads_traffic_and_looks_into_it(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(json.dumps(BODY))
    calls = vllm_cachescope.read_traffic(path)
    assert [finding.rule for finding in vllm_cachescope.lint(calls)] == ["timestamp"]
    assert [str(one.diagnosis.kind) for one in vllm_cachescope.explain(calls)] == ["first_request"]
    assert {"__version__", "explain", "lint", "read_traffic"} <= set(dir(vllm_cachescope))
    with pytest.raises(AttributeError, match="has no attribute 'exlpain'"):
        vllm_cachescope.exlpain  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_imports_nothing_from_elsewhere() -> None:
    code = (
        "import sys; before = {*sys.modules}; import vllm_cachescope; "
        "new = {name.partition('.')[0] for name in sys.modules.keys() - before}; "
        "print(new - sys.stdlib_module_names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "{'vllm_cachescope'}\n"
