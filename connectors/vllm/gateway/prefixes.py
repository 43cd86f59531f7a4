"""The rendered beginnings of requests: what tells the engine where their segments end."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.open_plan import Beginning
from vllm_cachescope.prompt.request import Part
from vllm_cachescope.prompt.segments import Segment
from vllm_cachescope.tenancy.owner_tags import readers
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf
from vllm_cachescope.wire.body import encode
from vllm_cachescope.wire.truncate import truncate

MAX_PARTS = 5_000
"""In a request of more parts no beginning is looked for."""

REMEMBERED = 10_000
"""Beginnings that are kept, of all organisations: some 3 KB each."""

_NOWHERE = Beginning(2**31, "", ())
"""What no prompt begins with: its segment is empty, and its tokens count as the next one's."""

_RENDERED = ("model", "messages", "tools", "chat_template_kwargs")

Render = Callable[[Mapping[str, Any]], Awaitable[list[int]]]
"""Returns the tokens of a body's prompt; raises `CannotRender`."""

logger = logger_of(__name__)


class CannotRender(Exception):
    """The server does not render the body."""


class Prefixes:
    """Finds what the segments of prompts end with.

    Args:
        account_of: returns who answers for an organisation, by its id.
    """

    def __init__(self, account_of: AccountOf) -> None:
        self._known: SharedMemo[tuple[str | None, bytes], Beginning] = SharedMemo(
            REMEMBERED, account_of=account_of
        )

    def purge(self, org: str | None = None, session: str | None = None) -> None:
        """Drop what is kept of rendered requests of ``org``, or of one session of ``org``; with
        None, of everyone."""
        self._known.purge(org, lambda key, _: session in (None, key[0]))

    async def of(
        self, context: RequestContext, cut: Sequence[Segment], render: Render
    ) -> list[Beginning | None]:
        """Return for each segment what it ends; None for the end of the prompt.

        Args:
            context: the request.
            cut: its segments.
            render: has the server render it.
        """
        assert context.request is not None
        if len(context.request.parts) > MAX_PARTS:
            return [None if segment.after is None else _NOWHERE for segment in cut]
        return [
            None
            if segment.after is None
            else await self._beginning(
                context, segment.after, readers(segment.scope, context.caller), render
            )
            for segment in cut
        ]

    async def _beginning(
        self, context: RequestContext, after: Part, found_by: Caller | None, render: Render
    ) -> Beginning:
        assert context.request is not None
        try:
            body = truncate(context.body, context.request.protocol, after)
            key = _content_key(body)
            if found_by is not None:
                known = self._known.get(found_by.org, (found_by.session, key))
                if known is not None:
                    return known
            beginning = Beginning.of(await _rendered(body, render))
        except CannotRender as error:
            logger.debug("No boundary after %s: %s", after.path, error)
            return _NOWHERE
        except Exception:
            # A mistake of ours costs hits, never the request.
            logger.exception("No boundary after %s", after.path)
            return _NOWHERE
        if found_by is not None:
            self._known.put(found_by.org, (found_by.session, key), beginning)
        return beginning


async def _rendered(body: dict[str, Any], render: Render) -> list[int]:
    """Return the tokens of a body's prompt. Where a template insists on a user message, an empty
    one is added: its tokens derive from nothing the client sent."""
    messages = body.get("messages") or []
    try:
        if messages:
            return await render(body)
    except CannotRender:
        pass
    return await render({**body, "messages": [*messages, {"role": "user", "content": ""}]})


def rendered_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that the server renders without running it."""
    return {name: body[name] for name in _RENDERED if name in body}


def _content_key(body: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(encode(rendered_fields(body))).digest()
