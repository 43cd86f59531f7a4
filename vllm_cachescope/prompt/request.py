"""A request as the cache sees it: an ordered list of parts, some ending in a breakpoint.

`vllm_cachescope.wire` reads the four wire formats (Messages, Chat Completions, Responses,
Completions) into this one shape, so that everything else is written once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from vllm_cachescope.prompt.ignored_marker import IgnoredMarker
from vllm_cachescope.tenancy.scope import Scope


class Protocol(StrEnum):
    """The wire format a request came in."""

    MESSAGES = "messages"
    CHAT = "chat"
    RESPONSES = "responses"
    COMPLETIONS = "completions"


class Region(IntEnum):
    """The regions of a prompt, in the order in which a breakpoint covers them."""

    TOOLS = 0
    SYSTEM = 1
    MESSAGES = 2

    @property
    def label(self) -> str:
        """The name used in configuration, reports and metric labels."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Mark:
    """A client's breakpoint marker: everything up to the end of its part is to be cached.

    Attributes:
        path: where the marker stands in the body, as in ``tools[7].cache_control``.
        ttl_s: TTL in seconds; None where the client named none.
        scope: how widely to share; None where the client named none.
    """

    path: str
    ttl_s: int | None = None
    scope: Scope | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The smallest unit of a request that a breakpoint can end: a tool, a block of a message.

    Attributes:
        region: the region of the prompt that the part belongs to.
        path: where the part stands in the body: ``tools[3]``, ``system``, ``system[1]``,
            ``messages[4].content``, ``messages[4].content[0]``, ``messages[4].tool_calls[1]``,
            ``input[2]``, ``prompt``.
        content: the part's JSON value, without breakpoint markers.
        role: the role of the part's message; None outside messages.
        mark: the marker of the breakpoint at the part's end; None for no breakpoint.
        narrowed: the narrowest scope that ignored markers on the part name; None for none. They
            make no breakpoint, but the part is shared no wider.
    """

    region: Region
    path: str
    content: Any
    role: str | None = None
    mark: Mark | None = None
    narrowed: Scope | None = None


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One request, read from the client's body.

    Attributes:
        protocol: the wire format of the body.
        model: the model's name as the client wrote it.
        parts: the parts, in the order tools, system, messages.
        automatic: whether the whole prompt is to be cached although no marker says so: true for a
            request without markers, and in OpenAI's implicit mode, which adds to the markers.
        ttl_s: TTL in seconds that the request as a whole asks for (OpenAI's retention and cache
            options); None for the default.
        session: the session that the body names (``session_id``, ``metadata.user_id``,
            ``prompt_cache_key``); None for none.
        prewarm: whether to fill the cache and generate nothing (``max_tokens: 0``, or
            ``prompt_cache_options.prewarm`` on Responses).
        session_over: whether the session is over with this request (``session_over: true``).
        params: other fields of the body that can change the rendered prompt (``tool_choice``,
            ``thinking``, ``output_config``, ``response_format``, ``reasoning``,
            ``chat_template_kwargs`` and the like), by field name.
        diagnose: whether the client asked for diagnostics.
        previous_id: id of the response to compare with, if the client named one for diagnostics.
        ignored: the markers, or fields of them, that do not count as they were written.
    """

    protocol: Protocol
    model: str
    parts: tuple[Part, ...]
    automatic: bool = True
    ttl_s: int | None = None
    session: str | None = None
    prewarm: bool = False
    session_over: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    diagnose: bool = False
    previous_id: str | None = None
    ignored: tuple[IgnoredMarker, ...] = ()
