"""A vLLM server in a process group of its own, which leaves nothing behind when it is stopped."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from vllm_cachescope.connectors.vllm import shm_regions

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


class ServerFailed(RuntimeError):
    """The server did not come up, or went down."""


def free_port() -> int:
    """Return a TCP port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server. As a context manager it starts on entry and is gone after exit.

    Everything vLLM writes (sockets, caches, compiled code, the log) goes into one scratch
    directory, removed at the end.

    Args:
        command: the server's command line, without host and port.
        environment: variables to set beside the ones set here.
        on_wait: called a few times per second while the server starts, with the seconds since.
    """

    health = "/health"
    """Where it answers once it is ready."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [*command, *self._address("127.0.0.1", port)]
        self._environment = dict(environment or {})
        self._on_wait = on_wait
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the API server."""
        assert self._process is not None
        return self._process.pid

    def begin(self) -> None:
        """Start it, without waiting until it is ready: several can start at once. Whoever calls
        this sees to it that the context is left."""
        self._scratch = tempfile.TemporaryDirectory(
            prefix="cachescope-", ignore_cleanup_errors=True
        )
        self._start(Path(self._scratch.name))

    def __enter__(self) -> Self:
        try:
            self.begin()
            self.wait_until_ready()
        except BaseException as error:
            self._stop()
            if isinstance(error, ServerFailed):
                error.add_note(self.log_tail())
            self._scratch.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if isinstance(error, Exception):
            error.add_note(self.log_tail())
        self._scratch.cleanup()

    def _address(self, host: str, port: int) -> list[str]:
        """Return the arguments that have the server listen there."""
        return ["--host", host, "--port", str(port)]

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines the server has logged."""
        log = (Path(self._scratch.name) / "log").read_text(errors="replace")
        return "The server's last words:\n" + "\n".join(log.splitlines()[-lines:])

    def _start(self, scratch: Path) -> None:
        own = {
            "TMPDIR": str(scratch),
            "HF_HOME": str(scratch / "hf"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(scratch / "vllm"),
            "VLLM_CONFIG_ROOT": str(scratch / "vllm-config"),
            "VLLM_NO_USAGE_STATS": "1",
            # With any KV connector vLLM wants one more core for itself; where it has none to
            # spare, threads then share cores and wait for each other most of the time.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        }
        self._process = self._launch(os.environ | own | self._environment, scratch / "log")

    def _launch(self, environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
        with open(log, "wb") as file:
            return subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A Ctrl-C is for us; we tell the server.
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            ServerFailed: if it ends before, or takes too long.
        """
        assert self._process is not None
        start = time.monotonic()
        while (waited := time.monotonic() - start) < START_TIMEOUT_S:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}")
            if self._is_ready():
                return
            self._on_wait(waited)
            time.sleep(0.25)
        raise ServerFailed(f"the server was not ready after {START_TIMEOUT_S:.0f} s")

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}{self.health}", timeout=5).status_code == 200
        return False

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        # A second Ctrl-C must not leave half of it running.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            # The engine's processes are in the same group. Python's resource tracker among them,
            # which takes no notice of SIGTERM, removes their shared memory once they are gone.
            for number in (signal.SIGTERM, signal.SIGKILL):
                if not self._signal_group(number):
                    break
                deadline = time.monotonic() + STOP_TIMEOUT_S
                while self._signal_group(0) and time.monotonic() < deadline:
                    time.sleep(0.05)
            shm_regions.remove_stale()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _signal_group(self, number: int) -> bool:
        """Send a signal (0 for none) to whatever is left of the server; return if there was any."""
        assert self._process is not None
        self._process.poll()  # reaps it: a dead leader would count as left
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True
