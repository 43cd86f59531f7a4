"""Usage is rewritten, and nothing else, however the server cuts its reply."""

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from vllm_cachescope.api.replies import Reply
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.cache.report import Report, Row
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.tenancy.scope import Caller, Scope

REPORT = Report(
    (
        Row("read_device", Scope.GLOBAL, 3600, 64),
        Row("read_cpu", Scope.ORG, 300, 32),
        Row("created", Scope.ORG, 300, 16),
        Row("uncached", Scope.ORG, 0, 8),
    )
)


def run(
    protocol: Protocol,
    chunks: list[bytes],
    content_type: str,
    status: int = 200,
    prewarm: bool = False,
    stream_prewarm: bool = False,
    reports: tuple[Report, ...] = (REPORT,),
    wants_tiers: bool = False,
) -> tuple[dict[bytes, bytes], bytes]:
    """Send a reply through, and return the headers and the body that the client got."""
    context = RequestContext(Caller("acme"), PromptRequest(protocol, "m", (), prewarm=prewarm))
    context.wants_tiers = wants_tiers
    context.reports.update({str(i): report for i, report in enumerate(reports)})
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    async def serve() -> None:
        reply = Reply(context, send, stream_prewarm=stream_prewarm)
        headers = [(b"content-type", content_type.encode()), (b"content-length", b"1")]
        await reply.send({"type": "http.response.start", "status": status, "headers": headers})
        for i, chunk in enumerate(chunks):
            more = i + 1 < len(chunks)
            await reply.send({"type": "http.response.body", "body": chunk, "more_body": more})

    asyncio.run(serve())
    assert got[0]["type"] == "http.response.start" and not got[-1].get("more_body", False)
    return dict(got[0]["headers"]), b"".join(m["body"] for m in got[1:])


def test_a_message_is_rewritten_and_its_length_too() -> None:
    body = {"type": "message", "content": [{"text": "naïve"}], "usage": {"input_tokens": 120}}
    headers, out = run(Protocol.MESSAGES, [json.dumps(body).encode()], "application/json")
    assert headers[b"content-length"] == str(len(out)).encode()
    data = json.loads(out)
    assert data["usage"] == {
        "input_tokens": 8,
        "cache_read_input_tokens": 96,
        "cache_creation_input_tokens": 16,
        "cache_creation": {"ephemeral_5m_input_tokens": 16, "ephemeral_1h_input_tokens": 0},
    }
    assert data["content"] == body["content"]


@pytest.mark.parametrize(
    ("protocol", "details"),
    [
        (Protocol.MESSAGES, None),
        (Protocol.CHAT, "prompt_tokens_details"),
        (Protocol.COMPLETIONS, "prompt_tokens_details"),
        (Protocol.RESPONSES, "input_tokens_details"),
    ],
)
def test_a_client_may_ask_what_each_tier_had(protocol: Protocol, details: str | None) -> None:
    body = json.dumps({"id": "1", "usage": {"prompt_tokens": 240}}).encode()
    for asked in (True, False):
        _, out = run(
            protocol,
            [body],
            "application/json",
            reports=(REPORT, REPORT),
            wants_tiers=asked,
        )
        usage = json.loads(out)["usage"]
        found = (usage[details] if details else usage).get("cached_tokens_details")
        assert found == ({"device": 128, "cpu": 64} if asked else None)


def test_several_prompts_add_up() -> None:
    body = json.dumps({"usage": {"prompt_tokens": 240, "total_tokens": 250}}).encode()
    _, out = run(Protocol.COMPLETIONS, [body], "application/json", reports=(REPORT, REPORT))
    details = json.loads(out)["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 192, "cache_write_tokens": 32}


STREAM = b"".join(
    b"event: e\ndata: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    for event in (
        {"type": "message_start", "message": {"usage": {"input_tokens": 120}}},
        {"type": "content_block_delta", "delta": {"text": 'about "usage" itself: \u00e9'}},
        {"type": "message_delta", "usage": {"output_tokens": 3}},
    )
) + b"data: [DONE]\n\n"  # fmt: skip


@given(st.sets(st.integers(1, len(STREAM) - 1), max_size=8))
def test_a_stream_may_be_cut_anywhere(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in pairwise(edges)]
    _, out = run(Protocol.MESSAGES, chunks, "text/event-stream; charset=utf-8")
    events = out.split(b"\n\n")
    originals = STREAM.split(b"\n\n")
    assert len(events) == len(originals)
    usage = json.loads(events[0].split(b"data: ")[1])["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (8, 96)
    assert json.loads(events[2].split(b"data: ")[1])["usage"]["output_tokens"] == 3
    assert events[1] == originals[1] and events[3] == originals[3]


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (400, "application/json", b'{"error": {"message": "usage"}}'),
        (200, "application/json", b'{"object":  "no usage here"}'),
        (200, "application/json", b"not json"),
        (200, "text/plain", b'{"usage": {}}'),
        (200, "application/json", b'{"usage":   null}'),
    ],
)
def test_what_has_no_usage_passes_unchanged(status: int, content_type: str, body: bytes) -> None:
    _, out = run(Protocol.CHAT, [body[:3], body[3:]], content_type, status)
    assert out == body


def test_without_a_report_a_reply_passes_unchanged() -> None:
    body = b'{"usage":   {"prompt_tokens": 4}}'
    assert run(Protocol.CHAT, [body], "application/json", reports=())[1] == body


def prewarmed(**options: Any) -> tuple[dict[bytes, bytes], bytes]:
    body = {
        "type": "message",
        "content": [{"type": "text", "text": "x"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 120, "output_tokens": 1},
    }
    return run(
        Protocol.MESSAGES, [json.dumps(body).encode()], "application/json", prewarm=True, **options
    )


def test_prewarming_returns_usage_and_no_content() -> None:
    data = json.loads(prewarmed()[1])
    assert data["content"] == [] and data["stop_reason"] == "max_tokens"
    assert data["usage"]["output_tokens"] == 0 and data["usage"]["cache_read_input_tokens"] == 96


def test_prewarming_can_be_streamed() -> None:
    headers, out = prewarmed(stream_prewarm=True)
    assert headers[b"content-type"].startswith(b"text/event-stream")
    lines = [line for line in out.split(b"\n") if line.startswith(b"data: ")]
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    assert [e["type"] for e in events] == ["message_start", "message_delta", "message_stop"]
    assert events[1]["delta"]["stop_reason"] == "max_tokens"


def test_prewarming_that_failed_passes_as_the_error_it_is() -> None:
    error = b'{"type": "error", "error": {"type": "overloaded_error"}}'
    _, out = run(
        Protocol.MESSAGES, [error], "application/json", 500, prewarm=True, stream_prewarm=True
    )
    assert out == error
