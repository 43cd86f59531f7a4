"""Codex' session files (``~/.codex/sessions/**/rollout-*.jsonl``): the items of a conversation.

No request stands in them. Where the model's output begins there was one, whose prompt was the
conversation up to there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm_cachescope.cli.traffic.call import Call
from vllm_cachescope.cli.traffic.envelope import text_of
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.unseen import UnseenHead
from vllm_cachescope.cli.traffic.usage import read_usage
from vllm_cachescope.config import Config
from vllm_cachescope.wire import openai_responses

_TTLS = Config().allowed_ttls
_KINDS = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
_NOT_SENT = ("ghost_snapshot", "other")


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is one of Codex'."""
    return record.get("type") in _KINDS and isinstance(record.get("payload"), Mapping)


class CodexSession:
    """Reads the lines of a session file, and tells the requests that they show."""

    def __init__(self) -> None:
        self._session: str | None = None
        self._model = ""
        self._instructions: str | None = None
        self._items: list[Mapping[str, Any]] = []
        self._at: float | None = None
        self._open: Call | None = None  # its usage comes after the output
        self._answering = False
        self._head = UnseenHead()

    def read(self, source: str, record: Mapping[str, Any]) -> Iterator[Call]:
        """Take a line, and yield the request before this one's, once all of it is known."""
        payload: Mapping[str, Any] = record["payload"]
        kind = record["type"]
        if kind == "session_meta":
            self._session = text_of(payload.get("id"))
            base = payload.get("base_instructions")
            base = base.get("text") if isinstance(base, Mapping) else base
            self._instructions = text_of(base) or text_of(payload.get("instructions"))
        elif kind == "turn_context":
            self._model = text_of(payload.get("model")) or self._model
        elif kind == "compacted":
            yield from self.end()
            kept = payload.get("replacement_history")
            text = str(payload.get("message") or "")
            summary = {"type": "message", "role": "user", "content": text}
            self._items = list(kept) if isinstance(kept, list) else [summary]
        elif kind == "event_msg" and payload.get("type") == "token_count":
            info = payload.get("info")
            last = info.get("last_token_usage") if isinstance(info, Mapping) else None
            if isinstance(last, Mapping) and self._open is not None:
                cached = {"cached_tokens": last.get("cached_input_tokens")}
                usage = read_usage({**last, "input_tokens_details": cached})
                self._open = replace(self._open, usage=usage)
                yield from self.end()
        elif kind == "response_item" and payload.get("type") not in _NOT_SENT:
            answers = _is_output(payload)
            if answers and not self._answering:
                yield from self.end()
                self._open = self._call(source)
            self._answering = answers
            self._items.append(payload)
        self._at = seconds_of(record.get("timestamp")) or self._at

    def end(self) -> Iterator[Call]:
        """Yield the last request, whether its usage is known or not."""
        if self._open is not None:
            yield self._head.before(self._open)
        self._open = None

    def _call(self, source: str) -> Call:
        body = {"model": self._model, "instructions": self._instructions, "input": self._items}
        return Call(source, self._at, self._session, openai_responses.read(body, _TTLS))


def _is_output(item: Mapping[str, Any]) -> bool:
    """Whether the model itself wrote an item."""
    kind = str(item.get("type"))
    if kind == "message":
        return item.get("role") == "assistant"
    return kind == "reasoning" or kind.endswith("_call")
