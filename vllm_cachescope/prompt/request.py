"""A request as the cache sees it: an ordered list of parts, some ending in a breakpoint.

The four wire formats (Messages, Chat Completions, Responses, Completions) are read into this one
shape by `vllm_cachescope.wire`; everything behind it is written once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

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
    """A breakpoint the client set: everything up to the end of its part is to be cached.

    Attributes:
        path: where it stands, as in ``tools[7].cache_control``.
        ttl_s: lifetime in seconds; None where the client left it to the default.
        scope: how widely to share; None where the client left it to the default.
    """

    path: str
    ttl_s: int | None = None
    scope: Scope | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The smallest unit of a request that a breakpoint can end: a tool, a block of a message.

    Attributes:
        region: which region of the prompt it belongs to.
        path: where it stands in the body: ``tools[3]``, ``system``, ``system[1]``,
            ``messages[4].content``, ``messages[4].content[0]``, ``input[2]``, ``prompt``.
        role: the role of its message; None outside messages.
        content: its JSON value with every cache marker removed.
        mark: the breakpoint at its end, if any.
    """

    region: Region
    path: str
    content: Any
    role: str | None = None
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One request, read from the client's body.

    Attributes:
        protocol: its wire format.
        model: the model's name as the client wrote it.
        parts: its parts in the order tools, system, messages.
        automatic: whether everything is to be cached without being marked: true for a request
            that carries no breakpoint at all, and for OpenAI's implicit mode, where breakpoints
            come on top.
        ttl_s: lifetime the request as a whole asks for (OpenAI's retention and cache options),
            in seconds; None for the default.
        session: the session the body names (``metadata.user_id``, ``prompt_cache_key``), or None.
        prewarm: whether to fill the cache and generate nothing (``max_tokens: 0``, or
            ``prompt_cache_options.prewarm`` on Responses).
        params: what else in the body can change the rendered prompt (``tool_choice``,
            ``thinking``, ``output_config``, ``response_format``, ``reasoning``,
            ``chat_template_kwargs`` and the like), by field name.
        previous_id: the response to compare with that the client named for diagnostics; None for
            none. `diagnose` tells whether diagnostics were asked for at all.
    """

    protocol: Protocol
    model: str
    parts: tuple[Part, ...]
    automatic: bool = True
    ttl_s: int | None = None
    session: str | None = None
    prewarm: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    diagnose: bool = False
    previous_id: str | None = None
