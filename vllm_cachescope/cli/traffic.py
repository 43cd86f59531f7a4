"""Reads recorded traffic: request bodies, text traces, block traces.

A file holds one JSON object a line, gzipped if its name ends in ``.gz``; ``-`` is standard input.
The keys of a line show which format it has:

- the body of a Messages, Chat, Responses or Completions request;
- an envelope around such a body: ``body`` or ``request``, with ``timestamp``, ``session_id``,
  ``headers``, ``path`` (or ``url``, as OpenAI's batch files have it) and ``response_id`` as far as
  they are known;
- a call of a text trace: ``input`` (the whole prompt as text), ``timestamp``, ``session_id``;
- a call of a block trace, as Mooncake publishes them: ``hash_ids`` (one per 512 tokens, equal for
  equal prefixes), ``input_length`` and ``timestamp`` in milliseconds.
"""

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_cachescope import wire
from vllm_cachescope.config import Config
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.caller import SESSION_HEADERS
from vllm_cachescope.wire.extras import extra_fields

BLOCK_TOKENS = 512
"""Tokens per hash id in Mooncake's traces."""

STANDARD_INPUT = Path("-")

_TTLS = Config().allowed_ttls  # those that a server accepts by default
_MAX_SECONDS = 253_402_300_800.0  # the year 10000: no time of day is later

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

_ROLE = re.compile(r"(system|developer|user|assistant|tool): ")


class TrafficError(ValueError):
    """A line that is none of the known formats, or a request the server would have refused; a file
    without any."""


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded request.

    Attributes:
        source: file and line, as in ``logs/traffic.jsonl:12``.
        at: when the call was made, in Unix seconds; None if not recorded, or not a possible time.
        session: the session it belongs to; None if it names none.
        request: the prompt and its breakpoints.
        extra: what else in body and headers to compare; see `extra_fields`.
        text: the whole prompt, in a text trace; otherwise None.
        response_id: the id of its response; None if not recorded.
    """

    source: str
    at: float | None
    session: str | None
    request: PromptRequest
    extra: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    response_id: str | None = None


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A call of a block trace.

    Attributes:
        source: file and line, as in ``logs/trace.jsonl:12``.
        at: when the call was made, in seconds since the start of the trace.
        tokens: length of the prompt, in tokens.
        blocks: a hash id for each block of `BLOCK_TOKENS` tokens; the last block may be partial.
    """

    source: str
    at: float
    tokens: int
    blocks: tuple[int, ...]


def read_traffic(path: Path) -> list[Call] | list[BlockCall]:
    """Return the calls in a file, in the order in which they were made.

    Args:
        path: the file; ``-`` for standard input.

    Raises:
        OSError: if the file cannot be read.
        TrafficError: on a line that cannot be understood, with its number.
    """
    calls: list[Call] = []
    block_calls: list[BlockCall] = []
    for call in stream_traffic(path):
        if isinstance(call, BlockCall):
            block_calls.append(call)
        else:
            calls.append(call)
    if calls and block_calls:
        raise TrafficError(f"{path}: holds both requests and block hashes; use two files")
    if block_calls:
        return sorted(block_calls, key=lambda call: call.at)
    # Recorders write a call when it ends; what it could reuse depends on when it began.
    if all(call.at is not None for call in calls):
        calls.sort(key=lambda call: call.at or 0.0)
    return calls


def stream_traffic(path: Path) -> Iterator[Call | BlockCall]:
    """Yield the calls in a file one by one, in the order in which they stand there.

    Args:
        path: the file; ``-`` for standard input.

    Raises:
        OSError: if the file cannot be read.
        TrafficError: on a line that cannot be understood, with its number.
    """
    for source, record in _records(path):
        if isinstance(record.get("hash_ids"), list):
            yield _block_call(source, record)
        elif (call := _call(source, record)) is not None:
            yield call


def text_request(text: str) -> PromptRequest:
    """Return the prompt ``text`` as a request whose parts are its paragraphs.

    A paragraph such as ``user: Hello`` begins a turn of that role; leading turns of ``system`` are
    the system prompt. A part's path is the turn's number and the paragraph's offset in characters:
    ``input[2]@1834``.
    """
    parts: list[Part] = []
    offset, turn, role, leading = 0, 0, None, True
    for paragraph in text.split("\n\n") if text else ():
        if begins := _ROLE.match(paragraph):
            role = begins[1]
            turn += offset > 0
        leading = leading and role == "system"
        region = Region.SYSTEM if leading else Region.MESSAGES
        parts.append(Part(region, f"input[{turn}]@{offset}", paragraph, role))
        offset += len(paragraph) + 2
    return PromptRequest(Protocol.COMPLETIONS, "", tuple(parts))


def protocol_of(body: Mapping[str, Any], path: str | None = None) -> Protocol:
    """Return the wire format of a request body.

    Args:
        body: the body.
        path: the path or URL the body was sent to, if known. Without a path the fields decide; a
            body that is legal in both Messages and Chat means the same in both.

    Raises:
        ValueError: if the body has none of the four formats.
    """
    if path is not None and (protocol := _served_at(path)) is not None:
        return protocol
    messages = body.get("messages")
    if isinstance(messages, list):
        return Protocol.CHAT if _is_chat(body, messages) else Protocol.MESSAGES
    if "input" in body:
        return Protocol.RESPONSES
    if "prompt" in body:
        return Protocol.COMPLETIONS
    raise ValueError("no messages, input or prompt")


def _served_at(path: str) -> Protocol | None:
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


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with _opened(path) as lines:
        for number, raw in enumerate(_lines(lines, path), 1):
            source = f"{path}:{number}"
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise TrafficError(f"{source}: not JSON: {error}") from None
            if not isinstance(record, Mapping):
                raise TrafficError(f"{source}: not an object")
            yield source, record


def _opened(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    if path == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrafficError(f"{path}: {error}") from None


def _call(source: str, record: Mapping[str, Any]) -> Call | None:
    """Return the call in ``record``; None if it went to an endpoint that takes no prompt."""
    at, session = _seconds(record.get("timestamp")), _text(record.get("session_id"))
    text = record.get("input")
    if isinstance(text, str) and "model" not in record:
        return Call(source, at, session, text_request(text), text=text)
    body = next(
        (v for key in ("body", "request") if isinstance(v := record.get(key), Mapping)), None
    )
    envelope: Mapping[str, Any] = record if body is not None else {}
    headers = envelope.get("headers")
    headers = headers if isinstance(headers, Mapping) else {}
    headers = {str(name).lower(): str(value) for name, value in headers.items()}
    body = record if body is None else body
    path = _text(envelope.get("path")) or _text(envelope.get("url"))
    if path is not None and _served_at(path) is None:
        return None
    try:
        protocol = protocol_of(body, path)
        request = wire.READERS[protocol](body, _TTLS)
    except BadRequest as error:
        raise TrafficError(f"{source}: {error}") from None
    except ValueError as error:
        raise TrafficError(f"{source}: not a request: {error}") from None
    named = next((value for name in SESSION_HEADERS if (value := headers.get(name))), None)
    return Call(
        source,
        at,
        session or named or request.session,
        request,
        extra_fields(body, headers),
        response_id=_text(envelope.get("response_id")),
    )


def _block_call(source: str, record: Mapping[str, Any]) -> BlockCall:
    at, tokens, blocks = (record.get(key) for key in ("timestamp", "input_length", "hash_ids"))
    at = _in_range(at, 1e3) if isinstance(at, int | float) else None
    if not (
        at is not None
        and isinstance(tokens, int)
        and isinstance(blocks, list)
        and all(isinstance(block, int) for block in blocks)
    ):
        raise TrafficError(
            f"{source}: timestamp, input_length or hash_ids is missing, not a number or no time"
        )
    if not 0 <= tokens <= len(blocks) * BLOCK_TOKENS:
        raise TrafficError(
            f"{source}: input_length {tokens} does not fit {len(blocks)} hash_ids of "
            f"{BLOCK_TOKENS} tokens"
        )
    return BlockCall(source, at, tokens, tuple(blocks))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _seconds(value: object) -> float | None:
    """Return a timestamp in seconds, whichever unit its size shows it to be in."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (OverflowError, ValueError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    unit = next((unit for unit in (1e9, 1e6, 1e3) if value > 1e8 * unit), 1.0)
    return _in_range(value, unit)


def _in_range(value: float, unit: float) -> float | None:
    """Return ``value / unit`` seconds; None if that is not finite or past the year 9999."""
    # An integer of hundreds of digits can be compared with a float, but not made one.
    return value / unit if abs(value) < _MAX_SECONDS * unit else None
