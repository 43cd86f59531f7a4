"""Real engines in processes of their own, which share a Redis."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.engine import forks
from tests.engine.engine import Answer, Ask

_START_S = 240
_ANSWER_S = 120


class Replica:
    """A vLLM engine in another process, driven from here.

    It starts in the background; the first call waits for it.

    Args:
        model: the model's directory.
        scratch: where it may write; its own.
        config: CacheScope's configuration, beyond that of all test engines.
        fresh: whether it is in an interpreter of its own, with a hash seed of its own, instead of
            in a fork.
        options: further engine arguments.
    """

    def __init__(
        self,
        model: Path,
        scratch: Path,
        config: dict[str, Any],
        fresh: bool = False,
        **options: Any,
    ) -> None:
        self._pipe, remote = multiprocessing.Pipe()
        arguments = (remote, model, scratch, config, options)
        if fresh:
            spawning = multiprocessing.get_context("spawn")
            self._process = spawning.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
        else:
            self._process = forks.process(_serve, *arguments, daemon=True)
        remote.close()
        self._started = False

    @property
    def pid(self) -> int:
        """The engine's process."""
        assert self._process.pid is not None
        return self._process.pid

    def run(self, *asks: Ask) -> list[Answer]:
        """Put all ``asks`` to the engine at once; return its answers in their order."""
        return self.wait(*self.begin(*asks))

    def begin(self, *asks: Ask) -> tuple[str, tuple[Ask, ...]]:
        """Begin what `run` does; `wait` ends it."""
        self._send("run", *asks)
        return "run", asks

    def wait(self, command: str, asks: tuple[Ask, ...]) -> list[Answer]:
        """Return the answers to what was begun."""
        return self._receive()

    def call(self, command: str | Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the test engine, of its connector (``command_…``), or of its clock; or
        a function of a module, with the engine as its first argument."""
        self._send(command, *arguments)
        return self._receive()

    def ready(self) -> None:
        """Wait until the engine has started."""
        if not self._started:
            assert self._pipe.poll(_START_S), "the engine does not start"
            try:
                said = self._pipe.recv()
            except EOFError:
                self._process.join()
                said = f"it ended with status {self._process.exitcode}"
            assert said == "ready", f"the engine did not start: {said}"
            self._started = True

    def stop(self) -> None:
        """End the process, as a crash would."""
        self._process.kill()
        self._process.join()

    def _send(self, command: str | Callable[..., Any], *arguments: Any) -> None:
        self.ready()
        self._pipe.send((command, arguments))

    def _receive(self) -> Any:
        assert self._pipe.poll(_ANSWER_S), "the engine does not answer"
        return self._pipe.recv()


def _serve(
    pipe: Connection, model: Path, scratch: Path, config: dict[str, Any], options: dict[str, Any]
) -> None:
    from tests.engine.engine import Engine

    try:
        engine = Engine(model, scratch, config=config, **options)
    except Exception:
        # What a test has printed is easily cut; why an engine is not there must not be.
        pipe.send(traceback.format_exc())
        raise
    pipe.send("ready")
    while True:
        # vLLM's own loop steps on as long as blocks are being stored.
        while not pipe.poll(0.001):
            engine.step()
        command, arguments = pipe.recv()
        if callable(command):
            pipe.send(command(engine, *arguments))
            continue
        targets = {"command": engine.connector, "advance": engine.clock}
        target = targets.get(command.partition("_")[0], engine)
        pipe.send(getattr(target, command)(*arguments))
