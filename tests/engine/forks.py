"""Processes that have vLLM imported when they start.

An import of vLLM takes 7 seconds of CPU time, and an engine about 2 more. One server imports vLLM
once for a whole session of tests and forks each further process.

A fork has the fork server's hash seed: that one process finds what another process has stored
needs a `Replica` that is ``fresh``.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM compiles a helper of its own for the log probabilities of a prompt, in 10 seconds.
    "TORCH_COMPILE_DISABLE": "1",
}
"""What is read as libraries are imported, for which a fork is too late."""


def start_server() -> None:
    """Start the fork server, if none is there. It imports in the background."""
    multiprocessing.set_forkserver_preload(["tests.engine.preloaded"])
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        forkserver.ensure_running()


def process(
    target: Callable[..., None], *arguments: Any, daemon: bool = False
) -> multiprocessing.process.BaseProcess:
    """Start a fork that calls ``target`` in this process's environment; return it.

    Args:
        target: a function of a module.
        arguments: what to call ``target`` with; they are pickled.
        daemon: whether the fork ends with this process. It cannot have processes of its own then.
    """
    start_server()
    forked = multiprocessing.get_context("forkserver").Process(
        target=_call, args=(dict(os.environ), target, arguments), daemon=daemon
    )
    forked.start()
    return forked


class Command:
    """A Python module's command in a fork; like a `subprocess.Popen` in a session of its own.

    Args:
        arguments: the module's name and its command-line arguments.
        environment: the fork's environment.
        log: the file for everything that the command writes.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._process = process(_run, list(arguments), dict(environment), log)

    @property
    def pid(self) -> int:
        """Its process id, which is that of its process group, too."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while the command runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return its exit status; None while the command runs."""
        return self.returncode

    def terminate(self) -> None:
        """Ask the command to end."""
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status once the command has ended.

        Raises:
            subprocess.TimeoutExpired: if the command runs on after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return self.returncode


def _call(
    environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # The fork server may have asked for it, with the directory of another environment.
    tempfile.tempdir = None
    target(*arguments)


def _run(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    # On a CPU vLLM insists on spawning its engines.
    multiprocessing.get_context = forking  # type: ignore[assignment]
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
