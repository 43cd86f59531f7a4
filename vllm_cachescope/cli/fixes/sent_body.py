"""A body as it was sent, to be corrected in place: where its tools, system texts and messages are.

Each wire format has them elsewhere. What a place is called here is its path in the body.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.cli.traffic.envelope import Envelope
from vllm_cachescope.prompt.request import Protocol

_TEXT = ("text", "input_text")
_SYSTEM = ("system", "developer")


@dataclass(slots=True)
class SentBody:
    """A request body that may be changed.

    Attributes:
        source: file and line.
        body: the body; a part of ``record``, or the whole of it.
        protocol: its wire format; None for Bedrock's Converse.
        envelope: what else is known of the request.
    """

    source: str
    body: dict[str, Any]
    protocol: Protocol | None
    envelope: Envelope

    @property
    def conversation(self) -> tuple[str | None, str]:
        """What is equal for all requests of a conversation, as far as the request says."""
        session = self.envelope.session or self.body.get("session_id")
        if not isinstance(session, str):
            session = json.dumps(self.body.get("metadata"), sort_keys=True, default=str)
        return session, str(self.body.get("model") or self.body.get("modelId"))

    @property
    def tools(self) -> list[Any]:
        """Its list of tools; an empty one if there is none."""
        config = self.body.get("toolConfig")
        owner = config if self.protocol is None and isinstance(config, dict) else self.body
        tools = owner.get("tools")
        return tools if isinstance(tools, list) else []

    @property
    def messages(self) -> list[Any]:
        """Its list of messages or items; an empty one if there is none."""
        key = "input" if self.protocol is Protocol.RESPONSES else "messages"
        messages = self.body.get(key)
        return messages if isinstance(messages, list) else []

    def system_texts(self) -> Iterator["SystemText"]:
        """Yield the texts of the system prompt."""
        if self.protocol is None:
            return
        for key in ("system", "instructions"):
            yield from _texts(self.body, key, key)
        if self.protocol in (Protocol.CHAT, Protocol.RESPONSES):
            name = "input" if self.protocol is Protocol.RESPONSES else "messages"
            for i, message in enumerate(self.messages):
                if not isinstance(message, dict) or message.get("role") not in _SYSTEM:
                    break
                yield from _texts(message, "content", f"{name}[{i}].content")

    def append(self, text: str) -> bool:
        """Say ``text`` at the very end of the prompt, behind all breakpoints. False if it cannot
        be said there."""
        if self.protocol is Protocol.RESPONSES and isinstance(said := self.body.get("input"), str):
            self.body["input"] = [{"role": "user", "content": said}]
        messages = self.messages
        last = messages[-1] if messages else None
        if not isinstance(last, dict) or last.get("role") == "assistant":
            return False
        if self.protocol is not Protocol.MESSAGES:
            messages.append({"role": "user", "content": text})
            return True
        content = last.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            return False
        last["content"] = [*content, {"type": "text", "text": text}]
        return True


@dataclass(frozen=True, slots=True)
class SystemText:
    """A text of a system prompt.

    Attributes:
        path: where it stands, as in ``system[1]``.
        text: the text.
        put: puts another one in its place; an empty one takes its block away.
    """

    path: str
    text: str
    put: Callable[[str], None]


def _texts(owner: dict[str, Any], key: str, path: str) -> Iterator[SystemText]:
    value = owner.get(key)
    if isinstance(value, str):

        def put(text: str) -> None:
            owner[key] = text

        yield SystemText(path, value, put)
    for i, block in enumerate(list(value) if isinstance(value, list) else ()):
        text = block.get("text") if isinstance(block, dict) else None
        if isinstance(text, str) and block.get("type") in _TEXT:
            yield SystemText(f"{path}[{i}]", text, _putter(value, block))


def _putter(blocks: Any, block: dict[str, Any]) -> Callable[[str], None]:
    def put(text: str) -> None:
        block["text"] = text
        if text or len(blocks) < 2:
            return
        at = next(i for i, one in enumerate(blocks) if one is block)
        del blocks[at]
        mark = block.get("cache_control")
        if mark is not None and at and isinstance(blocks[at - 1], dict):
            blocks[at - 1].setdefault("cache_control", mark)

    return put


def tool_name(tool: Any) -> str | None:
    """Return the name of a tool in any format; None if it has none."""
    if not isinstance(tool, dict):
        return None
    for owner in (tool, tool.get("function"), tool.get("toolSpec")):
        if isinstance(owner, dict) and isinstance(name := owner.get("name"), str):
            return name
    return None
