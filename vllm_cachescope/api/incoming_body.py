"""The body of a request as it comes in: read, and without the markers that are not the server's."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_cachescope.api.parsed_body import ParsedBody, copied
from vllm_cachescope.api.prewarming import one_token_body
from vllm_cachescope.config import Config
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.wire import READERS, strip
from vllm_cachescope.wire.body import decode, encode

LARGE_BYTES = 2**20
"""From this length on, in bytes, a body is read on a thread of its own, so that the streams of
others go on. It is about as much as a quarter of a million tokens of text."""


@dataclass(frozen=True, slots=True)
class IncomingBody:
    """A body that was read.

    Attributes:
        fields: its JSON object.
        request: the request as the cache sees it.
        forwarded: its JSON object as the server gets it.
        raw: what ``forwarded`` is as JSON; None if it is what came, or ``parsed`` says it.
        parsed: what the server gets in place of a large body's JSON; None if that is JSON.
        is_large: whether work on it is to be done off the event loop.
    """

    fields: dict[str, Any]
    request: PromptRequest
    forwarded: dict[str, Any]
    raw: bytes | None
    parsed: ParsedBody | None
    is_large: bool


async def read_incoming(
    raw: bytes, protocol: Protocol, config: Config, takes_parsed: bool = False
) -> IncomingBody | None:
    """Read a body; return None if it is no JSON object.

    Args:
        raw: the body.
        protocol: its wire format.
        config: the configuration.
        takes_parsed: whether the server takes the object of a large body (`parsed_body`).

    Raises:
        BadRequest: for a marker that is refused.
    """
    if len(raw) < LARGE_BYTES:
        return _read(raw, protocol, config, False)
    return await asyncio.to_thread(_read, raw, protocol, config, takes_parsed)


def _read(
    raw: bytes, protocol: Protocol, config: Config, takes_parsed: bool
) -> IncomingBody | None:
    fields = decode(raw)
    if not isinstance(fields, dict):
        return None
    replaced = raw if takes_parsed else None
    return incoming_of(fields, protocol, config, len(raw) >= LARGE_BYTES, replaced)


def incoming_of(
    fields: dict[str, Any],
    protocol: Protocol,
    config: Config,
    is_large: bool,
    replaced: bytes | None = None,
) -> IncomingBody:
    """Return the body whose JSON object is ``fields``.

    Args:
        fields: the object.
        protocol: its wire format.
        config: the configuration.
        is_large: whether work on it is to be done off the event loop.
        replaced: the JSON in place of which the server is to get an object; None if it gets JSON.

    Raises:
        BadRequest: for a marker that is refused.
    """
    request = READERS[protocol](
        fields,
        config.allowed_ttls,
        config.regions.messages.ttl_s,
        config.markers.is_strict(protocol),
    )
    forward = partial(_forwarded, is_prewarm=request.prewarm)
    forwarded = forward(fields)
    parsed = None
    if replaced is not None:
        # Too deep a body goes on as JSON.
        with suppress(RecursionError):
            parsed = ParsedBody(replaced, copied(forwarded), forward)
    encoded = encode(forwarded) if parsed is None and forwarded is not fields else None
    return IncomingBody(fields, request, forwarded, encoded, parsed, is_large)


def _forwarded(fields: dict[str, Any], is_prewarm: bool) -> dict[str, Any]:
    """Return the object that the server gets for a body's."""
    stripped = strip(fields)
    return one_token_body(stripped) if is_prewarm else stripped
