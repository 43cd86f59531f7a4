"""A large body that a server gets as the object it was read into, and does not parse once more.

A parser keeps every other thread waiting until it is done: 120 MB take half a second, in which no
stream goes on. A server built with Starlette reads bodies with `Request.json`.
"""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

_KEY = "cachescope.parsed_body"


class ParsedBody:
    """A body and its object, until the server has taken it.

    Args:
        raw: the body as it came.
        value: the object that the server gets. Nobody else has it: the server may change it.
        forwarded: makes such an object of a body's.
    """

    def __init__(
        self,
        raw: bytes,
        value: dict[str, Any],
        forwarded: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._kept: tuple[bytes, dict[str, Any]] | None = (raw, value)
        self._forwarded = forwarded

    def take(self, body: bytes) -> Any:
        """Return the object that the server gets for ``body``, which another middleware may have
        changed. Keeps neither: they may be megabytes, and the request long.

        Raises:
            ValueError: if ``body`` is no JSON.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == body:
            return kept[1]
        read = json.loads(body)
        return self._forwarded(read) if isinstance(read, dict) else read


def hand_over(scope: Scope, body: ParsedBody) -> Scope:
    """Return the scope of the same request, whose server gets the object of ``body``."""
    return {**scope, _KEY: body}


def install() -> None:
    """Have Starlette's requests look for what was handed over. Installing twice is harmless."""
    if hasattr(Request.json, "takes_parsed"):
        return
    parse = Request.json

    @wraps(parse)
    async def read(self: Request) -> Any:
        if not hasattr(self, "_json") and _KEY in self.scope:
            self._json = self.scope[_KEY].take(await self.body())
        return await parse(self)

    read.takes_parsed = True  # type: ignore[attr-defined]
    Request.json = read  # type: ignore[method-assign, assignment]


def copied(value: Any) -> Any:
    """Return a JSON value with lists and objects of its own.

    Raises:
        RecursionError: if it is too deep.
    """
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value
