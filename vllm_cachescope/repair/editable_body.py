"""A body that is corrected in place: where its tools, system texts, messages and calls are.

Each wire format has them elsewhere. What a place is called here is its path in the body.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire.blocks import MARKERS

_TEXT = ("text", "input_text")
_SYSTEM = ("system", "developer")


@dataclass(slots=True)
class EditableBody:
    """A request body that may be changed.

    Attributes:
        body: the body.
        protocol: its wire format; None for Bedrock's Converse.
    """

    body: dict[str, Any]
    protocol: Protocol | None

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
        if last.get("role") != "user":  # Of a tool, say.
            if self.protocol is Protocol.MESSAGES:
                return False
            messages.append({"role": "user", "content": text})
            return True
        # Not as a message of its own: some templates refuse two of a user in a row.
        kind = "input_text" if self.protocol is Protocol.RESPONSES else "text"
        content = last.get("content")
        if isinstance(content, str):
            # A marker on the message stays where the message ended.
            marks = {key: last.pop(key) for key in MARKERS if key in last}
            content = [{"type": kind, "text": content, **marks}]
        if not isinstance(content, list):
            return False
        last["content"] = [*content, {"type": kind, "text": text}]
        return True

    def tool_inputs(self) -> Iterator["ToolInput"]:
        """Yield the input of each tool call."""
        name = "input" if self.protocol is Protocol.RESPONSES else "messages"
        for i, message in enumerate(self.messages):
            if not isinstance(message, dict):
                continue
            path = f"{name}[{i}]"
            if "arguments" in message:
                yield ToolInput(message, "arguments", str(message.get("call_id")), path)
            content, calls = message.get("content"), message.get("tool_calls")
            for k, block in enumerate(content if isinstance(content, list) else ()):
                if isinstance(block, dict) and block.get("type") == "tool_use" and "input" in block:
                    where = f"{path}.content[{k}]"
                    yield ToolInput(block, "input", str(block.get("id")), where)
            for k, call in enumerate(calls if isinstance(calls, list) else ()):
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and "arguments" in function:
                    where = f"{path}.tool_calls[{k}]"
                    yield ToolInput(function, "arguments", str(call.get("id")), where)


@dataclass(frozen=True, slots=True)
class ToolInput:
    """The input of a tool call.

    Attributes:
        owner: the object that holds it.
        key: under which key.
        call: the call's id.
        path: where the call stands, as in ``messages[3].tool_calls[0]``.
    """

    owner: dict[str, Any]
    key: str
    call: str
    path: str


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


def editable(body: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``body`` of which every place may be changed. What places hold is shared:
    texts, schemas and inputs are to be replaced as a whole."""
    copied = dict(body)
    for name in ("tools", "system", "messages", "input"):
        if isinstance(value := body.get(name), list):
            copied[name] = [_copied(one) for one in value]
    return copied


def _copied(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    copied = dict(value)
    for name in ("content", "tool_calls"):
        if isinstance(inner := value.get(name), list):
            copied[name] = [_copied(one) for one in inner]
    if isinstance(function := value.get("function"), dict):
        copied["function"] = dict(function)
    return copied
