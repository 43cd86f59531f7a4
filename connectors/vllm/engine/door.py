"""The door of an engine: what its own port answers beside metrics, to whom no API side answers."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import msgspec

from vllm_cachescope.api.operations import health_of
from vllm_cachescope.connectors.vllm.engine.desk import Busy, Desk
from vllm_cachescope.connectors.vllm.engine_command import (
    HEALTH_PATH,
    MAX_BYTES,
    PATH,
    CommandReader,
    Refused,
)
from vllm_cachescope.logs import logger_of

ANSWER_S = 10.0
"""How long the engine may take to answer, in seconds: longer than a long step."""

logger = logger_of(__name__)


class EngineDoor:
    """Answers ``GET /health`` for anyone, and ``POST /command`` for who has the secret.

    Args:
        desk: asks the scheduler's thread.
        command: the connector's answer to a command, by its name and arguments.
        secret: key of the commands' MACs.
        rank: the engine's number among those behind one API server, from 0.
    """

    def __init__(
        self,
        desk: Desk,
        command: Callable[[str, Sequence[Any]], Any],
        secret: bytes,
        rank: int,
    ) -> None:
        self._desk = desk
        self._command = command
        self._reader = CommandReader(secret)
        self._rank = rank

    def answers(self, path: str) -> bool:
        """Whether a request for ``path`` is for this."""
        return path in (PATH, HEALTH_PATH)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as WSGI has it."""
        if environ["PATH_INFO"] == HEALTH_PATH:
            status, kind, body = self._health()
        elif environ["REQUEST_METHOD"] != "POST":
            status, kind, body = "405 Method Not Allowed", "text/plain", b"use POST\n"
        else:
            status, kind, body = self._carry_out(environ)
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def _health(self) -> tuple[str, str, bytes]:
        """Answer 200 whatever state the tiers are in, as the API side does."""
        tiers: Sequence[Mapping[str, Any]] | None = None
        try:
            tiers = self._desk.ask(lambda: self._command("health", ()), ANSWER_S)
        except Busy:
            logger.debug("The engine does not answer")
        found = None if tiers is None else {self._rank: tiers}
        return "200 OK", "application/json", json.dumps(health_of(found)).encode() + b"\n"

    def _carry_out(self, environ: WSGIEnvironment) -> tuple[str, str, bytes]:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            if not 0 < length <= MAX_BYTES:
                raise Refused("its length is not that of a command")
            command = self._reader.open(environ["wsgi.input"].read(length))
        except (Refused, ValueError, msgspec.DecodeError) as error:
            return "403 Forbidden", "text/plain", f"{error}\n".encode()
        try:
            call = lambda: self._command(command.name, command.args)  # noqa: E731
            answer = msgspec.msgpack.encode(self._desk.ask(call, ANSWER_S))
        except Busy:
            return "503 Service Unavailable", "text/plain", b"the engine does not answer\n"
        except Exception:
            logger.exception("Command %s failed", command.name)
            return "500 Internal Server Error", "text/plain", b"the command failed\n"
        return "200 OK", "application/msgpack", answer
