"""An HTTP request, as a middleware reads it and hands it on to the server."""

from collections import defaultdict

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope


def joined_headers(scope: Scope) -> Headers:
    """Return the request's headers, names in lower case, each character of a value a byte.

    Lines of one name are joined in their order to one list (RFC 9110, 5.2 and 5.3):
    ``anthropic-beta: b`` and ``anthropic-beta: a`` are ``b, a``.
    """
    values: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for name, value in scope["headers"]:
        values[name.lower()].append(value)
    return Headers(raw=[(name, b", ".join(lines)) for name, lines in values.items()])


async def read_body(scope: Scope, receive: Receive) -> tuple[bytes, Receive]:
    """Read the whole body.

    Returns:
        The body, and a `receive` that delivers it once more. If the client disconnects before the
        end of the body, the body is empty and that `receive` delivers the disconnection.
    """
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return b"", _preceded_by({"type": "http.disconnect"}, receive)
    return body, _preceded_by(_body_message(body), receive)


def with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """Return the scope and the `receive` of the same request with another body, which was read."""
    replaced = dict(scope)
    MutableHeaders(scope=replaced)["content-length"] = str(len(body))
    return replaced, _preceded_by(_body_message(body), receive)


def _body_message(body: bytes) -> Message:
    return {"type": "http.request", "body": body, "more_body": False}


def _preceded_by(message: Message, receive: Receive) -> Receive:
    # Popped, so that a long body is kept no longer than until the server has it.
    first = [message]

    async def receive_next() -> Message:
        return first.pop() if first else await receive()

    return receive_next
