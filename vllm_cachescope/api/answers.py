"""The answers to operations, refusals included."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class Answer(JSONResponse):
    """JSON in ASCII: names that a client made up may hold half a surrogate pair, which JSON
    can escape and UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Refused(Exception):
    """Raised for an operation that is wrongly asked for, or not the caller's to ask for.

    Args:
        status: the HTTP status of the answer.
        kind: the type of the error, as Anthropic's errors have one: ``permission_error``.
        message: what is wrong, for the client.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = headers

    def answer(self) -> Answer:
        """Return the answer that tells the client why."""
        error = {"type": self.kind, "message": str(self)}
        return Answer({"type": "error", "error": error}, self.status, self.headers)
