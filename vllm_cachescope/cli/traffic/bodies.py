"""Request bodies, in an envelope or by themselves, as calls."""

from collections.abc import Mapping

from vllm_cachescope import wire
from vllm_cachescope.cli.traffic import converse
from vllm_cachescope.cli.traffic.call import Call, TrafficError
from vllm_cachescope.cli.traffic.envelope import Envelope
from vllm_cachescope.cli.traffic.protocols import protocol_of, served_at
from vllm_cachescope.config import Config
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.tenancy.caller import SESSION_HEADERS
from vllm_cachescope.wire.extras import extra_fields
from vllm_cachescope.wire.session_end import header_says_over

_TTLS = Config().allowed_ttls  # those that a server accepts by default


class NoRequestError(TrafficError):
    """What is there is no request, or one without its body."""


def body_call(source: str, envelope: Envelope) -> Call | None:
    """Return the call in ``envelope``; None if it went to an endpoint that takes no prompt.

    Raises:
        NoRequestError: if the body is none of the known formats, or was not recorded.
        TrafficError: for a request that its server refuses.
    """
    path, body = envelope.path, envelope.body
    bedrock = path is not None and converse.is_path(path)
    if path is not None and not bedrock and served_at(path) is None:
        return None
    if body is None:
        raise NoRequestError(f"{source}: not a request: its body was not recorded")
    request: PromptRequest
    if converse.is_body(body):
        request = converse.read(body, path)
    else:
        try:
            request = wire.READERS[protocol_of(body, path)](body, _TTLS)
        except BadRequest as error:
            raise TrafficError(f"{source}: {error}") from None
        except ValueError as error:
            raise NoRequestError(f"{source}: not a request: {error}") from None
    headers = envelope.headers
    named = next((value for name in SESSION_HEADERS if (value := headers.get(name))), None)
    return Call(
        source,
        envelope.at,
        envelope.session or named or request.session,
        request,
        extra_fields(body, headers),
        response_id=envelope.response_id,
        usage=envelope.usage,
        ended=envelope.ended,
        session_over=request.session_over or _says_over(headers),
        body=None if converse.is_body(body) else body,
    )


def _says_over(headers: Mapping[str, str]) -> bool:
    try:
        return header_says_over(headers)
    except BadRequest:
        return False  # It says nothing of the prompt, which is all that is asked for here.
