"""Marked prompts: what Python code gives to `PromptCache`, with breakpoints and a caller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ScopeName = Literal["global", "org", "session"]


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A position up to which a prompt is to be cached.

    Attributes:
        end: the position: characters of a text, or tokens, from the start of the prompt.
        scope: how widely to share what lies before it; None for the operator's default.
        ttl: how long to keep it after its last use, as in ``"1h"``; None for the operator's
            default.
    """

    end: int
    scope: ScopeName | None = None
    ttl: str | None = None


@dataclass(frozen=True, slots=True)
class Cached:
    """A piece of a prompt that ends in a breakpoint.

    Attributes:
        content: its text, or its token ids.
        scope: as of a `Breakpoint`.
        ttl: as of a `Breakpoint`.
    """

    content: str | Sequence[int]
    scope: ScopeName | None = None
    ttl: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to cache up to its last breakpoint; one without breakpoints is cached whole.

    Scopes may only narrow along a prompt, and lifetimes only shorten.

    Attributes:
        content: the text, or the token ids.
        breakpoints: at most four, in order.
        org: on behalf of which organisation: its name, as in ``tenants``, or its id; None for the
            one of requests without an API key.
        session: the conversation inside the organisation; None for none.
    """

    content: str | Sequence[int]
    breakpoints: Sequence[Breakpoint] = ()
    org: str | None = None
    session: str | None = None

    @classmethod
    def of(
        cls,
        *pieces: str | Sequence[int] | Cached,
        org: str | None = None,
        session: str | None = None,
    ) -> "Prompt":
        """Return the prompt that consists of ``pieces``, all of them texts or all token ids.

        Raises:
            TypeError: if some are texts and some are token ids.
        """
        contents = [piece.content if isinstance(piece, Cached) else piece for piece in pieces]
        texts = [content for content in contents if isinstance(content, str)]
        if 0 < len(texts) < len(contents):
            raise TypeError("the pieces of a prompt are all texts, or all token ids")
        breakpoints: list[Breakpoint] = []
        end = 0
        for piece, content in zip(pieces, contents, strict=True):
            end += len(content)
            if isinstance(piece, Cached):
                breakpoints.append(Breakpoint(end, piece.scope, piece.ttl))
        tokens = [
            token for content in contents if not isinstance(content, str) for token in content
        ]
        return cls("".join(texts) if texts else tokens, breakpoints, org, session)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with the markers of Chat Completions: ``cache_control`` or
    ``prompt_cache_breakpoint`` on content parts, or on messages whose content is a string.

    Attributes:
        messages: the messages.
        org: as of a `Prompt`.
        session: as of a `Prompt`.
    """

    messages: Sequence[Mapping[str, Any]]
    org: str | None = None
    session: str | None = None
