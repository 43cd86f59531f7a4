"""The package installs from a wheel, from a source tree and editable, adapters and all."""

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

CHECK = """
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import vllm_cachescope.connectors

(plugin,) = entry_points(group="vllm.general_plugins", name="cachescope")
(script,) = entry_points(group="console_scripts", name="cachescope")
assert (plugin.module, plugin.attr) == ("vllm_cachescope.connectors.vllm.plugin", "register")
assert (script.module, script.attr) == ("vllm_cachescope.cli.main", "main")
assert find_spec(plugin.module) and find_spec(script.module)
# Something that LMCache needs installs a package called "tests"; ours is beside this one.
beside = Path(vllm_cachescope.__file__).parents[1]
found = [spec for name in ("connectors", "tests", "demo") if (spec := find_spec(name))]
assert not any(beside / spec.name == Path(spec.submodule_search_locations[0]) for spec in found)
assert vllm_cachescope.__version__ == version("vllm-cachescope")
print(version("vllm-cachescope"), vllm_cachescope.connectors.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    # An environment that runs the tests must not leak into the one under test.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    ran = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a clone holds, so that building leaves nothing in the working tree."""
    tree = tmp_path_factory.mktemp("clone") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("vllm_cachescope", "connectors", "tests", "demo", "benchmarks", "configs"):
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    return tree


@pytest.fixture(scope="module")
def dist(tree) -> Path:
    """The sdist, and the wheel made from it."""
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


@pytest.fixture
def fresh_env(tmp_path) -> Path:
    """The interpreter of a virtual environment that holds the build backend and nothing else."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    for pattern in ("setuptools", "setuptools-*.dist-info", "_distutils_hack"):
        for found in SITE_PACKAGES.glob(pattern):
            (site / found.name).symlink_to(found)
    return tmp_path / "env" / "bin" / "python"


def install(python: Path, *what: object, cwd: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "install", *offline, *what, cwd=cwd)


def check(python: Path, cwd: Path) -> Path:
    """Check the installed package from outside the tree; return where its adapters are."""
    # Its dependencies, which are installed here, must not be fetched again. This comes after
    # installing: the package is installed here too, and pip must not see that.
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    installed, connectors = run(python, "-c", CHECK, cwd=cwd).split()
    assert installed == "0.1.0"
    assert "cachescope" in run(python.parent / "cachescope", "--help", cwd=cwd)
    for command in ([python.parent / "cachescope"], [python, "-m", "vllm_cachescope"]):
        assert run(*command, "--version", cwd=cwd) == "cachescope 0.1.0\n"
    return Path(connectors)


def test_the_wheel_holds_the_package_and_nothing_else(tree, dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    names = {entry.filename for entry in entries}
    assert {name.split("/")[0] for name in names} == {
        "vllm_cachescope",
        "vllm_cachescope-0.1.0.dist-info",
    }
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)
    in_tree = {
        str(path.relative_to(tree))
        for package in ("vllm_cachescope", "connectors")
        for path in (tree / package).rglob("*.py")
        if not path.is_relative_to(tree / "vllm_cachescope" / "connectors")
    }
    expected = {
        f"vllm_cachescope/{name}" if name.startswith("connectors/") else name for name in in_tree
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert "vllm_cachescope/connectors/vllm/__init__.py" in expected
    assert "vllm_cachescope/py.typed" in names
    data = {
        str(path.relative_to(tree))
        for path in (tree / "vllm_cachescope").rglob("*.*")
        if path.suffix in (".css", ".gz", ".html", ".js", ".svg")
    }
    assert data and data <= names
    files = {
        f"vllm_cachescope/{path.relative_to(tree / 'vllm_cachescope')}"
        for path in (tree / "vllm_cachescope" / "api" / "page_assets").iterdir()
    }
    assert files and files <= names
    assert "vllm_cachescope-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_sdist_holds_the_adapters_as_files(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert members["vllm_cachescope/connectors/vllm/__init__.py"].isreg()
    assert not any(member.issym() for member in members.values())


def test_a_wheel_installs_into_a_fresh_environment(dist, fresh_env, tmp_path):
    (wheel,) = dist.glob("*.whl")
    install(fresh_env, wheel, cwd=tmp_path)
    assert check(fresh_env, tmp_path).is_relative_to(tmp_path / "env")


def test_a_source_tree_installs(tree, fresh_env, tmp_path):
    install(fresh_env, tree, cwd=tmp_path)
    assert check(fresh_env, tmp_path).is_relative_to(tmp_path / "env")


def test_an_editable_install_runs_from_the_tree(tree, fresh_env, tmp_path):
    install(fresh_env, "-e", tree, cwd=tmp_path)
    connectors = check(fresh_env, tmp_path)
    assert connectors.resolve() == (tree / "connectors" / "__init__.py").resolve()
