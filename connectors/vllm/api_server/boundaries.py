"""The boundaries of a prompt: where its segments end, in tokens.

The request is rendered once more with everything after a segment removed. The tokens that this
rendering and the prompt have in common, from the start, are those of the segment and of what comes
before it.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.connectors.vllm.api_server.rendering import CannotRender, Rendering
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.boundaries import Landmark, common_prefix, last_within
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.prompt.segments import Segment
from vllm_cachescope.prompt.token_array import token_array
from vllm_cachescope.tenancy.owner_tags import readers
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.wire.truncate import truncate

logger = logger_of(__name__)

MAX_PARTS = 5_000
"""In a request of more parts no boundary is looked for: rendering it again would hold the event
loop for too long. Its prompt is shared as narrowly as its narrowest part."""

_SYSTEM, _TOOL_NAME = "Some system prompt.", "some_tool"
_TOOL = {
    "type": "function",
    "function": {"name": _TOOL_NAME, "parameters": {"type": "object", "properties": {}}},
}
_QUESTION = {"role": "user", "content": "Hello."}
_PROBES = [[_QUESTION], [_QUESTION, {"role": "assistant", "content": "Hello."}, _QUESTION]]


@dataclass(frozen=True, slots=True)
class RenderedPrefix:
    """A request up to the end of one of its parts, rendered.

    Attributes:
        path: path of that part: ``messages[3].content``.
        body: the request's body without what comes after the part.
        text: the text of its prompt; None if its tokens are known.
        tokens: the tokens of its prompt; None if they can be found by the text. Empty if the
            prefix cannot be rendered: then no token is in it.
        readers: who may find what is kept of its rendering; None for nobody.
    """

    path: str
    body: dict[str, Any]
    text: str | None = None
    tokens: "array[int] | None" = None
    readers: Caller | None = None


class Boundaries:
    """Finds where the segments of a prompt end, in tokens.

    Args:
        state: the API server's state, with its renderer and endpoint handlers.
        on_tokenizing: called when the server is about to tokenise a prompt; returns who may find
            what is kept of its tokens, None for nobody.
        account_of: returns who answers for an organisation, by its id.
        token_bytes: memory for the tokens of recent prompts, in bytes; 0 to keep none.
    """

    def __init__(
        self,
        state: Any,
        on_tokenizing: Callable[[], Caller | None] = lambda: None,
        account_of: AccountOf = own_account,
        token_bytes: int = 0,
    ) -> None:
        self._rendering = Rendering(state, on_tokenizing, account_of, token_bytes)

    def purge(self, org: str | None = None, session: str | None = None) -> None:
        """Drop what is kept of rendered requests of ``org``, or of one session of ``org``; with
        None, of everyone."""
        self._rendering.purge(org, session)

    async def prefixes(
        self,
        request: PromptRequest,
        body: Mapping[str, Any],
        segments: tuple[Segment, ...],
        caller: Caller,
    ) -> list[RenderedPrefix | None]:
        """Render the request up to the end of each segment; None for one that ends the prompt.

        Needs no tokens of the prompt: it can run while the server is still tokenising it.

        Args:
            request: the request.
            body: its body, without markers.
            segments: its segments.
            caller: whose request it is.
        """
        if len(request.parts) > MAX_PARTS:
            logger.debug("No boundaries in a request of %s parts", len(request.parts))
            unknown = RenderedPrefix("", {}, tokens=array("I"))
            return [None if segment.after is None else unknown for segment in segments]
        return [
            None
            if segment.after is None
            else await self._prefix(
                request.protocol, body, segment.after, readers(segment.scope, caller)
            )
            for segment in segments
        ]

    async def ends(
        self,
        prefixes: Sequence[RenderedPrefix | None],
        protocol: Protocol,
        tokens: list[int],
        text: str | None,
    ) -> list[int]:
        """Return where each segment ends, in tokens from the start of the prompt.

        A segment whose end cannot be found is empty: its tokens count as the next segment's,
        which is shared no wider.

        Args:
            prefixes: from `prefixes`.
            protocol: the request's wire format.
            tokens: the prompt's token ids.
            text: the prompt's rendered text, if known.
        """
        by_text = text is not None and any(
            prefix and prefix.text is not None for prefix in prefixes
        )
        ids = array("I")
        # The engine will refuse a prompt of what is no token.
        with suppress(OverflowError, TypeError):
            ids = token_array(tokens) if any(prefixes) else ids
        landmarks = self._rendering.special.landmarks(text or "", ids) if by_text else []
        ends: list[int] = []
        for prefix in prefixes:
            if prefix is None:
                ends.append(len(tokens))
                continue
            try:
                end = await self._end(prefix, protocol, ids, text, landmarks)
            except Exception as error:
                _log(prefix.path, error)
                end = 0
            ends.append(max(end, ends[-1] if ends else 0))
        return ends

    async def renders_tools_behind_system(self) -> bool | None:
        """Return whether the chat template renders tools behind the system prompt, found by
        rendering both; None if that cannot be told, or differs from prompt to prompt."""
        found = set()
        for turns in _PROBES:
            body = {"messages": [{"role": "system", "content": _SYSTEM}, *turns], "tools": [_TOOL]}
            try:
                text = await self._rendering.text(body, Protocol.CHAT) or ""
            except Exception as error:
                _log("tools", error)
                return None
            places = text.find(_TOOL_NAME), text.find(_SYSTEM)
            found.add(None if min(places) < 0 else places[0] > places[1])
        return found.pop() if len(found) == 1 else None

    async def _prefix(
        self,
        protocol: Protocol,
        body: Mapping[str, Any],
        after: Part,
        readers: Caller | None,
    ) -> RenderedPrefix:
        try:
            truncated = truncate(body, protocol, after)
            if after.region is Region.MESSAGES:
                # Histories are long and never the same: their ends are found without tokenising
                # them.
                text = await self._rendering.text(truncated, protocol)
                if text is not None:
                    return RenderedPrefix(after.path, truncated, text=text, readers=readers)
            tokens = await self._rendering.tokens(truncated, protocol, readers)
            return RenderedPrefix(after.path, truncated, tokens=tokens)
        except Exception as error:
            _log(after.path, error)
            return RenderedPrefix(after.path, {}, tokens=array("I"))

    async def _end(
        self,
        prefix: RenderedPrefix,
        protocol: Protocol,
        tokens: "array[int]",
        text: str | None,
        landmarks: Sequence[Landmark],
    ) -> int:
        if prefix.text is not None and text is not None:
            last = last_within(landmarks, common_prefix(prefix.text, text))
            if last is not None:
                rest = await self._rendering.tokenize(prefix.text[last.start :])
                return last.token + common_prefix(rest, tokens[last.token :])
        rendered = prefix.tokens
        if rendered is None:
            rendered = await self._rendering.tokens(prefix.body, protocol, prefix.readers)
        return common_prefix(rendered, tokens)


def _log(path: str, error: Exception) -> None:
    if isinstance(error, CannotRender):
        logger.debug("No boundary after %s: %s", path, error)
    else:
        # A mistake of ours costs hits, never the request.
        logger.error("No boundary after %s", path, exc_info=error)
