"""The wire format of a recorded body: by the path it was sent to, or else by its fields."""

from collections.abc import Mapping
from typing import Any

from vllm_cachescope import wire
from vllm_cachescope.prompt.request import Protocol

# A body with `messages` is Chat or Messages. Where neither its tools nor its messages show which,
# these fields do: those that only one of the two formats has in the `openai` and `anthropic`
# packages and in vLLM.
_CHAT_FIELDS = frozenset(
    {
        *("add_generation_prompt", "add_special_tokens", "audio", "chat_template"),
        *("continue_final_message", "documents", "frequency_penalty", "function_call", "functions"),
        *("logit_bias", "logprobs", "max_completion_tokens", "media_io_kwargs", "modalities"),
        *("mm_processor_kwargs", "moderation", "n", "parallel_tool_calls", "prediction"),
        *("presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("reasoning_effort", "response_format", "safety_identifier", "seed", "stop", "store"),
        *("stream_options", "top_logprobs", "truncate_prompt_tokens", "truncation_side", "user"),
        *("verbosity", "web_search_options"),
    }
)
_MESSAGES_FIELDS = frozenset(
    {
        *("cache_control", "container", "context_management", "diagnostics", "inference_geo"),
        *("mcp_servers", "output_config", "output_format", "speed", "stop_sequences", "thinking"),
    }
)


def protocol_of(body: Mapping[str, Any], path: str | None = None) -> Protocol:
    """Return the wire format of a request body.

    Args:
        body: the body.
        path: the path or URL the body was sent to, if known. Without a path the fields decide; a
            body that is legal in both Messages and Chat means the same in both.

    Raises:
        ValueError: if the body has none of the four formats.
    """
    if path is not None and (protocol := served_at(path)) is not None:
        return protocol
    messages = body.get("messages")
    if isinstance(messages, list):
        return Protocol.CHAT if _is_chat(body, messages) else Protocol.MESSAGES
    if "input" in body:
        return Protocol.RESPONSES
    if "prompt" in body:
        return Protocol.COMPLETIONS
    raise ValueError("no messages, input or prompt")


def served_at(path: str) -> Protocol | None:
    """Return the wire format that is served at a path or URL; None if none is."""
    path = path.partition("?")[0]
    # A gateway may put a prefix of its own in front of the path. Azure has no v1 in
    # /openai/deployments/NAME/chat/completions, nor in the /chat/completions of its batch files.
    tail = "/".join(path.strip("/").split("/")[-2:])
    candidates = (path, f"/{tail}", f"/v1/{tail}")
    return next((served for one in candidates if (served := wire.protocol_of(one))), None)


def _is_chat(body: Mapping[str, Any], messages: list[Any]) -> bool:
    tools = body.get("tools")
    tools = tools if isinstance(tools, list) else []
    if "system" in body or any(isinstance(t, Mapping) and "input_schema" in t for t in tools):
        return False
    if any(isinstance(tool, Mapping) and "function" in tool for tool in tools):
        return True
    if any(
        isinstance(message, Mapping)
        and (message.get("role") in ("system", "developer", "tool") or "tool_calls" in message)
        for message in messages
    ):
        return True
    metadata = body.get("metadata")
    names_user = isinstance(metadata, Mapping) and "user_id" in metadata
    return len(body.keys() & _CHAT_FIELDS) > len(body.keys() & _MESSAGES_FIELDS) + names_user
