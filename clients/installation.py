"""Where a client's packages are installed: each client in a folder of its own, at its version."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = ROOT / ".clients"
OWN = ROOT / ".venv"
"""The environment of the tests, which has both SDKs."""

_RECORD = "packages.txt"


class NotInstalled(RuntimeError):
    """A client cannot be installed on this machine."""


@dataclass(frozen=True, slots=True)
class Packages:
    """Packages of one registry, with their versions.

    Attributes:
        tool: ``npm``, or the Python to make a virtual environment with; empty for `OWN`.
        names: the packages, as the tool takes them.
    """

    tool: str
    names: tuple[str, ...]

    @property
    def versions(self) -> str:
        """The version of the first package."""
        return re.split("[@=]+", self.names[0])[-1]

    def install(self, folder: str) -> Path:
        """Install them, unless they are there already; return where.

        Raises:
            NotInstalled: if the tool is missing or fails.
        """
        if not self.tool:
            return OWN
        prefix = PREFIXES / folder
        record = prefix / _RECORD
        wanted = "\n".join(self.names)
        if record.exists() and record.read_text() == wanted:
            return prefix
        shutil.rmtree(prefix, ignore_errors=True)
        if shutil.which(self.tool) is None:
            raise NotInstalled(f"needs {self.tool}")
        prefix.mkdir(parents=True)
        if self.tool == "npm":
            _call("npm", "install", "--prefix", str(prefix), "--no-audit", "--no-fund", *self.names)
        else:
            _call(self.tool, "-m", "venv", str(prefix))
            _call(str(prefix / "bin" / "pip"), "install", "--quiet", *self.names)
        record.write_text(wanted)
        return prefix


def npm(*names: str) -> Packages:
    """Return packages from npm."""
    return Packages("npm", names)


def pip(*names: str, python: str = "python3.11") -> Packages:
    """Return packages from PyPI, for an interpreter."""
    return Packages(python, names)


def _call(*command: str) -> None:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode != 0:
        raise NotInstalled(_last_line(ended.stdout.splitlines()))


def _last_line(lines: Sequence[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "no reason given")[:200]
