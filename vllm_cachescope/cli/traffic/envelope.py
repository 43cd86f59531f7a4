"""An envelope: a request body with what a recorder noted beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.cli.traffic.call import Usage
from vllm_cachescope.cli.traffic.endings import ending_in, reasons_of
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.usage import response_id_in, usage_in

_TIMES = ("timestamp", "start_time", "startTime", "created_at", "time")
_BODIES = ("body", "request", "request_body")
_PATHS = ("path", "url", "endpoint")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A request body and what is known of the request.

    Attributes:
        body: the body; None if it was not recorded.
        at: when the request was made, in Unix seconds; None if not recorded.
        session: the session that the recorder names; None for none.
        headers: the request's headers, names in lower case.
        path: the path or URL that it was sent to; None if not recorded.
        response_id: the id of its response; None if not recorded.
        usage: what its response said of the cache; None if not recorded.
        ended: how its answer ended; None if not recorded.
        bare: whether there is nothing but a body.
    """

    body: Mapping[str, Any] | None
    at: float | None = None
    session: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    response_id: str | None = None
    usage: Usage | None = None
    ended: Ended | None = None
    bare: bool = False


def envelope_of(record: Mapping[str, Any]) -> Envelope:
    """Return a line of JSON as an envelope: it is one, or the body itself.

    A recorder's ``request`` is the body, or an object with the request's own ``body``, ``headers``
    and ``url``. A body may be JSON in a string.
    """
    outer = record
    http = record.get("request")
    if isinstance(http, Mapping) and ("body" in http or "headers" in http):
        record = {**record, **http}
    bodies = (as_body(record.get(key)) for key in _BODIES)
    body = next((one for one in bodies if one is not None), None)
    times = (seconds_of(outer.get(key)) for key in _TIMES)
    at = next((one for one in times if one is not None), None)
    if not any(key in record for key in (*_BODIES, *_PATHS)):
        body = record
    if body is record:
        response, session = record.get("response"), text_of(record.get("session_id"))
        usage = usage_in(record) or usage_in(response)
        ended = ending_in(response)
        return Envelope(body, at, session, usage=usage, ended=ended, bare=True)
    response = outer.get("response")
    return Envelope(
        body,
        at,
        text_of(outer.get("session_id")),
        headers_of(record.get("headers")),
        next((path for key in _PATHS if (path := text_of(record.get(key)))), None),
        text_of(outer.get("response_id")) or response_id_in(response),
        usage_in({"usage": outer.get("usage"), "response": response}),
        ending_in(response, reasons_of(outer)),
    )


def as_body(value: object) -> Mapping[str, Any] | None:
    """Return a body, given as an object or as JSON in a string; None if it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def headers_of(value: object) -> dict[str, str]:
    """Return headers, given as an object or as a list of names and values, with names in lower
    case."""
    if isinstance(value, Mapping):
        return {str(name).lower(): str(one) for name, one in value.items()}
    pairs = value if isinstance(value, list) else []
    return {
        str(pair.get("name")).lower(): str(pair.get("value"))
        for pair in pairs
        if isinstance(pair, Mapping)
    }


def text_of(value: object) -> str | None:
    """Return a text that is not empty; None for anything else."""
    return value if isinstance(value, str) and value else None
