"""Claude Code's session files (``~/.claude/projects/*/*.jsonl``): what was said, line by line.

No request stands in them. Each answer of the model shows that there was one, whose prompt was the
conversation up to there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_cachescope.cli.traffic.call import Call
from vllm_cachescope.cli.traffic.envelope import text_of
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.unseen import UnseenHead
from vllm_cachescope.cli.traffic.usage import read_usage
from vllm_cachescope.config import Config
from vllm_cachescope.wire import anthropic

_TTLS = Config().allowed_ttls
_HOUR_S = 3600


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is one of Claude Code's."""
    return "sessionId" in record and "uuid" in record and isinstance(record.get("type"), str)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the conversation.

    Attributes:
        parent: the line before it; None at the beginning.
        at: when it was written, in Unix seconds.
        message: its message; None for a line that is no part of the prompt.
        answer: the id of the answer that it is a part of; None for the user's.
        root: the first line of its conversation.
    """

    parent: "_Line | None"
    at: float | None
    message: Mapping[str, Any] | None
    answer: str | None
    root: str


class ClaudeCodeSession:
    """Reads the lines of a session file, and tells the requests that they show."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._asked: set[str] = set()
        self._heads: dict[str, UnseenHead] = {}
        self._ttls: dict[str, int] = {}

    def read(self, source: str, record: Mapping[str, Any]) -> Iterator[Call]:
        """Take a line, and yield the request that it shows, if it is the first of an answer."""
        message = record.get("message")
        message = message if isinstance(message, Mapping) else None
        kind = record["type"]
        if kind not in ("user", "assistant") or (
            message is not None and message.get("model") == "<synthetic>"
        ):
            message = None
        parent = self._lines.get(str(record.get("parentUuid")))
        answer = message.get("id") if message is not None and kind == "assistant" else None
        name = str(record["uuid"])
        root = parent.root if parent is not None else name
        line = _Line(parent, seconds_of(record.get("timestamp")), message, text_of(answer), root)
        self._lines[name] = line
        if line.answer is None or line.answer in self._asked or message is None:
            return
        self._asked.add(line.answer)
        usage = message.get("usage")
        messages = _messages(parent)
        body = {"model": message.get("model"), "messages": messages}
        request = anthropic.read(body, _TTLS, strict=False)
        call = Call(
            source,
            parent.at if parent is not None else line.at,
            text_of(record.get("sessionId")),
            replace(request, ttl_s=self._ttl(root, usage)),
            response_id=line.answer,
            usage=read_usage(usage),
        )
        yield self._heads.setdefault(root, UnseenHead()).before(call)

    def _ttl(self, root: str, usage: object) -> int | None:
        """Return the lifetime that the conversation's breakpoints ask for, as its usage shows."""
        written = usage.get("cache_creation") if isinstance(usage, Mapping) else None
        if isinstance(written, Mapping) and written.get("ephemeral_1h_input_tokens"):
            self._ttls[root] = _HOUR_S
        return self._ttls.get(root)


def _messages(line: _Line | None) -> list[dict[str, Any]]:
    """Return the messages up to a line, the blocks of one answer as one message."""
    messages: list[dict[str, Any]] = []
    last: str | None = None
    while line is not None:
        if line.message is not None:
            content = line.message.get("content")
            blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
            if messages and line.answer is not None and line.answer == last:
                messages[-1]["content"] = [*blocks, *messages[-1]["content"]]
            else:
                messages.append({"role": line.message.get("role"), "content": list(blocks)})
            last = line.answer
        line = line.parent
    return messages[::-1]
