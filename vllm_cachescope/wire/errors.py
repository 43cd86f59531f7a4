"""The bodies of a 400 response, in each protocol's own format."""

from typing import Any

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Protocol


def error_body(protocol: Protocol, error: BadRequest) -> dict[str, Any]:
    """Return the JSON body that tells the client about ``error``, to be sent with status 400.

    In OpenAI's formats ``param`` is the path of the field at fault.
    """
    if protocol is Protocol.MESSAGES:
        return {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": str(error)},
        }
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": error.path,
            "code": "invalid_value",
        }
    }
