"""The wire formats: each request body is read into one `PromptRequest`."""

from collections.abc import Collection, Mapping
from typing import Any
from typing import Protocol as Interface

from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.wire import (
    anthropic,
    openai_chat,
    openai_completions,
    openai_responses,
)
from vllm_cachescope.wire.blocks import strip
from vllm_cachescope.wire.parts import DEFAULT_TTL_S

__all__ = ["READERS", "Reader", "protocol_of", "reader_for", "strip"]


class Reader(Interface):
    """Reads a request's body.

    If ``strict``, it raises `BadRequest` for a wrong cache field; if not, it ignores the field or
    reads it narrower. The default is each protocol's own: strict for Messages alone.
    """

    def __call__(
        self,
        body: Mapping[str, Any],
        ttls: Collection[int],
        default_ttl_s: int = DEFAULT_TTL_S,
        strict: bool = ...,
    ) -> PromptRequest: ...


READERS: Mapping[Protocol, Reader] = {
    Protocol.MESSAGES: anthropic.read,
    Protocol.CHAT: openai_chat.read,
    Protocol.RESPONSES: openai_responses.read,
    Protocol.COMPLETIONS: openai_completions.read,
}

_PATHS = {
    "/v1/messages": Protocol.MESSAGES,
    "/v1/chat/completions": Protocol.CHAT,
    "/v1/responses": Protocol.RESPONSES,
    "/v1/completions": Protocol.COMPLETIONS,
}


def protocol_of(path: str) -> Protocol | None:
    """Return the wire format served at the URL path ``path``; None for any other path.

    A prefix, such as a gateway's root path, may come before the format's own path.
    """
    for end, protocol in _PATHS.items():
        if path.endswith(end):
            return protocol
    return None


def reader_for(path: str) -> Reader | None:
    """Return the reader of the wire format served at ``path``, as `protocol_of` finds it."""
    protocol = protocol_of(path)
    return None if protocol is None else READERS[protocol]
