"""Writes what the cache did into a reply's usage, and leaves every other byte alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from vllm_cachescope.api.diagnostics import early_answer
from vllm_cachescope.api.endings import ending_of
from vllm_cachescope.api.opening import Opening
from vllm_cachescope.api.prewarming import drop_token, stream_of
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.api.usage import Usage, write_chat, write_messages, write_responses
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.repair import Repair

_WRITERS: dict[Protocol, Callable[[dict[str, Any], Usage], None]] = {
    Protocol.MESSAGES: write_messages,
    Protocol.CHAT: write_chat,
    Protocol.COMPLETIONS: write_chat,
    Protocol.RESPONSES: write_responses,
}

_MESSAGE = "msg_"


class Reply:
    """Passes a server's reply on to the client, with the usage rewritten.

    Args:
        context: the request's context; its reports fill in while the reply is sent.
        send: sends a message to the client.
        opening: the request's diagnosis; None if the reply is to have none.
        stream_prewarm: whether the client wants to have a pre-warming streamed, which the server
            answers in one piece.
        repairs: what was put right in the request.

    Attributes:
        id: the response's id; None before it was seen.
        ended: how the answer ended; None before it has, or if the reply does not say.
    """

    def __init__(
        self,
        context: RequestContext,
        send: Send,
        opening: Opening | None = None,
        stream_prewarm: bool = False,
        repairs: Sequence[Repair] = (),
    ) -> None:
        assert context.request is not None
        self._context = context
        self._request = context.request
        self._send = send
        self._opening = opening
        self._repairs = repairs
        self.id: str | None = None
        self.ended: Ended | None = None
        self._stream_prewarm = stream_prewarm
        self._start: Message | None = None
        self._streaming = False
        self._unsent = b""

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
        content_type = Headers(scope=message).get("content-type", "")
        if message["status"] == 200 and content_type.startswith("text/event-stream"):
            self._streaming = True
            await self._send(message)
        elif message["status"] == 200 and content_type.startswith("application/json"):
            # Not sent before the body is known: its length changes with the usage.
            self._start = message
        else:
            await self._send(message)

    async def _collect(self, message: Message) -> None:
        self._unsent += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        self._note_ending(self._unsent)
        body = self._rewritten(self._unsent)
        headers = MutableHeaders(scope=self._start)
        if self._stream_prewarm:
            body = b"".join(stream_of(json.loads(body)))
            headers["content-type"] = "text/event-stream; charset=utf-8"
        headers["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        more = message.get("more_body", False)
        # An event ends with an empty line and may be cut anywhere by the chunks.
        *events, self._unsent = (self._unsent + message.get("body", b"")).split(b"\n\n")
        out = b"".join(self._rewritten_event(event) + b"\n\n" for event in events)
        if not more and self._unsent:
            out, self._unsent = out + self._rewritten_event(self._unsent), b""
        if out or not more:
            await self._send({**message, "body": out})

    def _rewritten_event(self, event: bytes) -> bytes:
        self._note_ending(event)
        ends = self._request.diagnose and b'"finish_reason"' in event
        if b'"usage"' not in event and self.id is not None and not ends:
            return event
        lines = event.split(b"\n")
        for i, line in enumerate(lines):
            if line.startswith(b"data: {"):
                lines[i] = b"data: " + self._rewritten(line.removeprefix(b"data: "))
        return b"\n".join(lines)

    def _note_ending(self, data: bytes) -> None:
        """Note how the answer ended, if this part of the reply says so. Of several choices one that
        waits for a tool counts."""
        if self.ended is not Ended.TOOLS:
            is_responses = self._request.protocol is Protocol.RESPONSES
            ended = ending_of(data, is_responses)
            self.ended = self.ended if ended is None else ended

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
                changed |= self._identify(holder)
            has_usage = isinstance(holder.get("usage"), dict)
            if has_usage and usage is not None:
                _WRITERS[self._request.protocol](holder["usage"], usage)
                self._tell_repairs(holder["usage"], usage.read)
                changed = True
            if "id" in holder and (has_usage or _is_finished(holder)):
                changed |= self._diagnose(holder, usage)
        if self._request.prewarm and "usage" in data:
            drop_token(data)
            changed = True
        if not changed:
            return raw
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()

    def _identify(self, reply: dict[str, Any]) -> bool:
        """Take the reply's id; return whether it was changed.

        vLLM's own begin as those of Chat do. A client that is to name a message later may take only
        an id that begins as Anthropic's do for one (Pydantic AI leaves others out).
        """
        changed = (
            self._request.diagnose
            and self._request.protocol is Protocol.MESSAGES
            and not reply["id"].startswith(_MESSAGE)
        )
        if changed:
            reply["id"] = _MESSAGE + reply["id"].removeprefix("chatcmpl-")
        self.id = reply["id"]
        return changed

    def _diagnose(self, reply: dict[str, Any], usage: Usage | None) -> bool:
        """Write the diagnostics that the client asked for; return whether it asked for any."""
        opening = self._opening
        if opening is None or not self._request.diagnose:
            return False
        if opening.pending is None and opening.is_over:
            return False
        name = "prompt_cache_diagnostics"
        if self._request.protocol is Protocol.MESSAGES:
            name = "diagnostics"
        if opening.pending is None:
            reply[name] = early_answer(self._request)
        else:
            reply[name] = opening.pending.answer(usage.read if usage else None)
        return True

    def _tell_repairs(self, usage: dict[str, Any], read_tokens: int) -> None:
        repairs = self._repairs
        if self._opening is not None and self._opening.pending is not None:
            repairs = self._opening.pending.repairs(read_tokens)
        if repairs:
            usage["prompt_repairs"] = [repair.to_dict() for repair in repairs]

    def _usage(self) -> Usage | None:
        reports = self._context.reports.values()
        if not reports:
            return None
        created: Counter[int] = Counter()
        by_tier: Counter[str] = Counter()
        for report in reports:
            created.update(report.created_by_ttl)
            by_tier.update(report.read_by_tier)
        return Usage(
            prompt_tokens=sum(report.prompt_tokens for report in reports),
            read=sum(report.read_tokens for report in reports),
            created_by_ttl=created,
            read_by_tier=by_tier if self._context.wants_tiers else None,
        )


def _replies(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects that may have usage and an id: ``data`` and a reply inside of it, as the
    event ``message_start`` has one."""
    yield data
    for name in ("message", "response"):
        if isinstance(data.get(name), dict):
            yield data[name]


def _is_finished(chunk: dict[str, Any]) -> bool:
    """Whether a chunk of Chat completions ends a choice. Every stream has such a chunk; one with
    usage comes after it only if the client asked for it."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )
