from typing import Any

import httpx
from anthropic.types import ErrorResponse
from openai import BadRequestError

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire.errors import error_body

ERROR = BadRequest("system[2].cache_control.ttl", "2h", ("5m", "1h"))
MESSAGE = "system[2].cache_control.ttl: '2h' is not allowed here; allowed: one of 5m, 1h"


def test_messages() -> None:
    body = error_body(Protocol.MESSAGES, ERROR)
    assert body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": MESSAGE},
    }
    assert ErrorResponse.model_validate(body).error.type == "invalid_request_error"


def test_openai() -> None:
    for protocol in (Protocol.CHAT, Protocol.RESPONSES, Protocol.COMPLETIONS):
        assert error_body(protocol, ERROR) == {
            "error": {
                "message": MESSAGE,
                "type": "invalid_request_error",
                "param": "system[2].cache_control.ttl",
                "code": "invalid_value",
            }
        }


def test_the_openai_client_finds_the_field() -> None:
    request = httpx.Request("POST", "http://localhost/v1/chat/completions")
    response: Any = httpx.Response(400, request=request)
    raised = BadRequestError(
        MESSAGE, response=response, body=error_body(Protocol.CHAT, ERROR)["error"]
    )
    assert (raised.param, raised.code) == ("system[2].cache_control.ttl", "invalid_value")


def test_the_message_is_short_whatever_the_value() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, [1] * 10**6, {"k": deep}, deep):
        assert len(str(BadRequest("p", value, "nothing"))) < 300
