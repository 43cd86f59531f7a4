"""The body of a request as it comes in: read, and without the markers that are not the server's."""

import asyncio
from dataclasses import dataclass
from typing import Any

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
        raw: what ``forwarded`` is as JSON; None if it is what came.
        is_large: whether work on it is to be done off the event loop.
    """

    fields: dict[str, Any]
    request: PromptRequest
    forwarded: dict[str, Any]
    raw: bytes | None
    is_large: bool


async def read_incoming(raw: bytes, protocol: Protocol, config: Config) -> IncomingBody | None:
    """Read a body; return None if it is no JSON object.

    Args:
        raw: the body.
        protocol: its wire format.
        config: the configuration.

    Raises:
        BadRequest: for a marker that is refused.
    """
    if len(raw) < LARGE_BYTES:
        return _read(raw, protocol, config)
    return await asyncio.to_thread(_read, raw, protocol, config)


def _read(raw: bytes, protocol: Protocol, config: Config) -> IncomingBody | None:
    fields = decode(raw)
    if not isinstance(fields, dict):
        return None
    return incoming_of(fields, protocol, config, len(raw) >= LARGE_BYTES)


def incoming_of(
    fields: dict[str, Any], protocol: Protocol, config: Config, is_large: bool
) -> IncomingBody:
    """Return the body whose JSON object is ``fields``.

    Raises:
        BadRequest: for a marker that is refused.
    """
    request = READERS[protocol](
        fields,
        config.allowed_ttls,
        config.regions.messages.ttl_s,
        config.markers.is_strict(protocol),
    )
    forwarded = strip(fields)
    if request.prewarm:
        forwarded = one_token_body(forwarded)
    encoded = None if forwarded is fields else encode(forwarded)
    return IncomingBody(fields, request, forwarded, encoded, is_large)
