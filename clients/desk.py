"""The desk that one client works at: a scratch home, a project with a file to read, a key."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.session import agent_session

FILE = "tide.txt"
TEXT = "High water at 04:10 and 16:35."
"""What stands in the file: a request that holds it has had its tool called."""

QUESTION = "And when is low water?"
"""What the resumed session is asked."""

_TIMEOUT_S = 180


class ClientFailed(RuntimeError):
    """A client's command did not end well."""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where one client runs.

    Attributes:
        url: the server, without a path.
        key: the client's API key, an organisation of its own.
        prefix: where the client is installed.
        directory: what it may write to.
    """

    url: str
    key: str
    prefix: Path
    directory: Path

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True)
        self.project.mkdir()
        (self.project / FILE).write_text(f"{TEXT}\n")
        (self.project / "handbook.txt").write_text(agent_session(1, 1).system[0]["text"])

    @property
    def home(self) -> Path:
        """The client's home directory."""
        return self.directory / "home"

    @property
    def project(self) -> Path:
        """The client's working directory."""
        return self.directory / "project"

    @property
    def file(self) -> str:
        """The file to read, with its whole path."""
        return str(self.project / FILE)

    def program(self, name: str) -> str:
        """Return the program ``name`` of an npm package or of a virtual environment."""
        folders = (self.prefix / "node_modules" / ".bin", self.prefix / "bin")
        return str(next(f / name for f in folders if (f / name).exists()))

    def run(self, *command: str, **environment: str) -> str:
        """Run a command of the client in its project; return what it printed.

        Raises:
            ClientFailed: if it fails, or is not done after some minutes.
        """
        own = self.environment() | environment
        try:
            ended = subprocess.run(
                command,
                cwd=self.project,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ClientFailed(f"{_named(command)} took over {_TIMEOUT_S} s") from error
        if ended.returncode != 0:
            raise ClientFailed(
                f"{_named(command)} ended with {ended.returncode}:\n{ended.stdout[-2000:]}"
            )
        return ended.stdout

    def environment(self) -> dict[str, str]:
        """Return the variables of every command: nothing of the user's own configuration."""
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "TMPDIR": str(self.directory),
            "XDG_CONFIG_HOME": str(self.home / ".config"),
            "XDG_DATA_HOME": str(self.home / ".local/share"),
            "XDG_STATE_HOME": str(self.home / ".local/state"),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
        }


def _named(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:3]])
