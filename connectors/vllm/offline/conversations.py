"""The boundaries of offline conversations, which `LLM` renders with its chat template."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.connectors.vllm.offline.planner import CheckedConversation, shared_ends
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.request import Part, Protocol
from vllm_cachescope.wire.body import encode
from vllm_cachescope.wire.truncate import truncate

logger = logger_of(__name__)

_RENDERING = (
    "chat_template",
    "chat_template_content_format",
    "chat_template_kwargs",
    "tokenization_kwargs",
    "mm_processor_kwargs",
)
_UNANSWERED = {"add_generation_prompt": False}
_ENDING = ("add_generation_prompt", "continue_final_message")


class _UnsentRenderer:
    """Renders for no engine: vLLM's own cache of images takes what it has rendered as sent."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    def render_chat(self, *args: Any, **options: Any) -> Any:
        return self._renderer.render_chat(*args, **options, skip_mm_cache=True)


class ConversationRendering:
    """Renders conversations as one call of `LLM.chat` does.

    Args:
        llm: vLLM's `LLM`.
        options: the call's options.
    """

    def __init__(self, llm: Any, options: Mapping[str, Any]) -> None:
        # Renders as the `LLM` does, and leaves the `LLM` as it is.
        self._llm = copy.copy(llm)
        self._llm.renderer = _UnsentRenderer(llm.renderer)
        self._options = {name: options[name] for name in _RENDERING if name in options}
        self._ending = {name: options[name] for name in _ENDING if name in options}
        self._beginnings: dict[bytes, list[int]] = {}

    def ends(self, conversation: CheckedConversation) -> list[int]:
        """Return where the conversation's segments end, in tokens.

        A segment whose end cannot be found is empty: its tokens count as the next segment's,
        which is shared no wider.
        """
        tokens = self._tokens(conversation.body, self._ending)
        return shared_ends(
            [
                tokens if segment.after is None else self._beginning(conversation, segment.after)
                for segment in conversation.cut
            ],
            tokens,
        )

    def _beginning(self, conversation: CheckedConversation, after: Part) -> list[int]:
        body = truncate(conversation.body, Protocol.CHAT, after)
        key = hashlib.sha256(encode(body)).digest()
        if key not in self._beginnings:
            self._beginnings[key] = self._truncated_tokens(body, after.path)
        return self._beginnings[key]

    def _truncated_tokens(self, body: Mapping[str, Any], path: str) -> list[int]:
        """Return the tokens of a body that was cut off. Where a template insists on a user
        message, an empty one is added: its tokens derive from nothing in the conversation."""
        empty = {"role": "user", "content": ""}
        problem: Exception | None = None
        for messages in (body["messages"], [*body["messages"], empty]):
            try:
                return self._tokens(
                    {**body, "messages": messages}, {"add_generation_prompt": False}
                )
            except Exception as error:
                # Templates raise what they like.
                problem = error
        logger.debug("No boundary after %s: %s", path, problem)
        return []

    def _tokens(self, body: Mapping[str, Any], ending: Mapping[str, bool]) -> list[int]:
        (prompt,) = self._llm._preprocess_chat(
            [body["messages"]], tools=body.get("tools"), **self._options, **ending
        )
        return list(prompt["prompt_token_ids"])
