"""Writes what the cache did into a reply's usage, and leaves every other byte alone."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from starlette.types import Message, Send

from vllm_cachescope.api.diagnoser import PendingDiagnosis
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.api.usage import Usage, write_chat, write_messages, write_responses
from vllm_cachescope.prompt.request import Protocol

_WRITERS: dict[Protocol, Callable[[dict[str, Any], Usage], None]] = {
    Protocol.MESSAGES: write_messages,
    Protocol.CHAT: write_chat,
    Protocol.COMPLETIONS: write_chat,
    Protocol.RESPONSES: write_responses,
}


class Reply:
    """Passes a server's reply on to the client, usage rewritten.

    Args:
        exchange: the exchange the reply belongs to; its reports fill in while the reply runs.
        send: the client's side.
        case: the request's diagnosis, if it has one.
        stream_prewarm: whether the client asked for a pre-warming to be streamed, which the
            server was asked to answer in one piece.

    Attributes:
        id: the response's id, once seen.
    """

    def __init__(
        self,
        exchange: RequestContext,
        send: Send,
        case: PendingDiagnosis | None = None,
        stream_prewarm: bool = False,
    ) -> None:
        assert exchange.request is not None
        self._exchange = exchange
        self._request = exchange.request
        self._send = send
        self._case = case
        self.id: str | None = None
        self._stream_prewarm = stream_prewarm
        self._start: Message | None = None
        self._streaming = False
        self._held = b""

    async def send(self, message: Message) -> None:
        """Take one ASGI message from the server."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self._streaming:
            await self._stream(message)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._collect(message)
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        content_type = _header(message, b"content-type")
        if message["status"] == 200 and content_type.startswith(b"text/event-stream"):
            self._streaming = True
            await self._send(message)
        elif message["status"] == 200 and content_type.startswith(b"application/json"):
            # Held back: the length changes with the usage.
            self._start = message
        else:
            await self._send(message)

    async def _collect(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        body = self._rewritten(self._held)
        if self._stream_prewarm:
            body = b"".join(_as_events(json.loads(body)))
            _set_header(self._start, b"content-type", b"text/event-stream; charset=utf-8")
        _set_header(self._start, b"content-length", str(len(body)).encode())
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        more = message.get("more_body", False)
        # An event ends with an empty line and may be cut anywhere by the chunks.
        *events, self._held = (self._held + message.get("body", b"")).split(b"\n\n")
        out = b"".join(self._rewritten_event(event) + b"\n\n" for event in events)
        if not more and self._held:
            out, self._held = out + self._rewritten_event(self._held), b""
        if out or not more:
            await self._send({**message, "body": out})

    def _rewritten_event(self, event: bytes) -> bytes:
        ends = self._request.diagnose and b'"finish_reason"' in event
        if b'"usage"' not in event and self.id is not None and not ends:
            return event
        lines = event.split(b"\n")
        for i, line in enumerate(lines):
            if line.startswith(b"data: {"):
                lines[i] = b"data: " + self._rewritten(line.removeprefix(b"data: "))
        return b"\n".join(lines)

    def _rewritten(self, raw: bytes) -> bytes:
        try:
            data = json.loads(raw)
        except ValueError:
            return raw
        if not isinstance(data, dict):
            return raw
        usage = self._usage()
        changed = False
        for holder in _replies(data):
            if isinstance(holder.get("id"), str):
                self.id = holder["id"]
            has_usage = isinstance(holder.get("usage"), dict)
            if has_usage and usage is not None:
                _WRITERS[self._request.protocol](holder["usage"], usage)
                changed = True
            if "id" in holder and (has_usage or _is_finished(holder)):
                changed |= self._diagnose(holder, usage)
        if self._request.prewarm and "usage" in data:
            _empty(data)
            changed = True
        if not changed:
            return raw
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()

    def _diagnose(self, reply: dict[str, Any], usage: Usage | None) -> bool:
        """Write the diagnostics that the client asked for; return whether it asked for any."""
        if self._case is None or not self._request.diagnose:
            return False
        name = "prompt_cache_diagnostics"
        if self._request.protocol is Protocol.MESSAGES:
            name = "diagnostics"
        reply[name] = self._case.answer(usage.read if usage else None)
        return True

    def _usage(self) -> Usage | None:
        reports = self._exchange.reports.values()
        if not reports:
            return None
        created: dict[int, int] = {}
        for report in reports:
            for ttl_s, tokens in report.created_by_ttl.items():
                created[ttl_s] = created.get(ttl_s, 0) + tokens
        return Usage(
            prompt_tokens=sum(report.prompt_tokens for report in reports),
            read=sum(report.read_tokens for report in reports),
            created_by_ttl=created,
        )


def _replies(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what carries usage and an id: a reply, or an event and the reply inside it."""
    yield data
    for name in ("message", "response"):
        if isinstance(data.get(name), dict):
            yield data[name]


def _is_finished(chunk: dict[str, Any]) -> bool:
    """Whether it ends a choice: the last chunk that comes for certain in a stream of chunks."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


def _empty(reply: dict[str, Any]) -> None:
    """Take out of a pre-warming's reply the one token that was made."""
    if reply.get("object") == "response":
        reply["output"] = []
        reply["status"], reply["incomplete_details"] = "completed", None
        reply["usage"]["total_tokens"] = reply["usage"].get("input_tokens", 0)
    else:
        reply["content"] = []
        reply["stop_reason"], reply["stop_sequence"] = "max_tokens", None
    reply["usage"]["output_tokens"] = 0


def _as_events(reply: dict[str, Any]) -> Iterator[bytes]:
    """Yield the stream of events that says what a pre-warming's reply says."""
    events: tuple[dict[str, Any], ...]
    if reply.get("object") == "response":
        started = {**reply, "status": "in_progress", "usage": None}
        events = (
            {"type": "response.created", "sequence_number": 0, "response": started},
            {"type": "response.completed", "sequence_number": 1, "response": reply},
        )
    else:
        started = {**reply, "stop_reason": None, "stop_sequence": None}
        delta = {"stop_reason": reply["stop_reason"], "stop_sequence": None}
        events = (
            {"type": "message_start", "message": started},
            {"type": "message_delta", "delta": delta, "usage": reply["usage"]},
            {"type": "message_stop"},
        )
    for event in events:
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        yield f"event: {event['type']}\ndata: {data}\n\n".encode()


def _header(message: Message, name: bytes) -> bytes:
    return next((bytes(v) for k, v in message["headers"] if k.lower() == name), b"")


def _set_header(message: Message, name: bytes, value: bytes) -> None:
    kept = [(k, v) for k, v in message["headers"] if k.lower() != name]
    message["headers"] = [*kept, (name, value)]
