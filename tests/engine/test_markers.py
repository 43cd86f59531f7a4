"""What is left of markers when vLLM itself has read a body."""

from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from tests.core.wire_bodies import MARK, marked
from vllm_cachescope.wire import strip


def test_no_marker_reaches_the_prompt() -> None:
    """vLLM renders some blocks as text, and hands Responses tools on with keys it does not know."""

    def converted(**marks: Any) -> Any:
        block = {"type": "text", "text": "x", **marks}
        result = {"type": "tool_result", "tool_use_id": "t", "content": [block], **marks}
        body = {"model": "m", "max_tokens": 1, "tools": marked(**marks)["tools"]}
        body["messages"] = [{"role": "assistant", "content": [result]}]
        request = AnthropicMessagesRequest.model_validate(strip(body))
        chat = AnthropicServingMessages.to_chat_completion_request(request)
        return chat.messages, chat.tools

    assert converted(**MARK) == converted()

    def tools(**marks: Any) -> Any:
        tool = {"type": "function", "name": "a", "parameters": {}, "strict": False, **marks}
        body = strip({"model": "m", "input": "x", "tools": [tool]})
        return [tool.model_dump() for tool in ResponsesRequest(**body).tools]

    assert tools(**MARK) == tools()
