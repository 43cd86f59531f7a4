"""The end of a session, as a client says it with its last request: in a field of the body, the same
in all formats, or in a header."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker, IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.wire.fields import read_flag
from vllm_cachescope.wire.mistakes import Mistakes

FIELD = "session_over"
HEADER = "x-cachescope-session-over"

NEEDS_SESSION = "false, or a request that names its session"
"""What is allowed where a request that names no session says that it is over."""


def read_session_over(body: Mapping[str, Any], mistakes: Mistakes) -> bool:
    """Return whether a body says that its session is over.

    Raises:
        BadRequest: if mistakes refuse the request, for anything but true, false and null.
    """
    return bool(mistakes.read(IgnoredReason.OPTION, read_flag, body.get(FIELD), FIELD))


def header_says_over(headers: Mapping[str, str]) -> bool:
    """Return whether a request's headers (names in lower case) say that its session is over.

    Raises:
        BadRequest: if there is anything but ``true`` and ``false``.
    """
    if (value := headers.get(HEADER, "false")) not in ("true", "false"):
        raise BadRequest(HEADER, value, ("true", "false"))
    return value == "true"


def without_end(request: PromptRequest) -> PromptRequest:
    """Return a request without saying that its session is over: it names none."""
    ignored = IgnoredMarker(FIELD, IgnoredReason.OPTION)
    return replace(request, session_over=False, ignored=(*request.ignored, ignored))
