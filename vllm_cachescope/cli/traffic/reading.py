"""Reads a file of recorded traffic, whichever log it is."""

import gzip
import zlib
from collections.abc import Generator, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from vllm_cachescope.cli.traffic import har, litellm, mitmproxy, opentelemetry
from vllm_cachescope.cli.traffic.blocks import block_call
from vllm_cachescope.cli.traffic.bodies import NoRequestError, body_call
from vllm_cachescope.cli.traffic.call import BlockCall, Call, LeftOut, TrafficError
from vllm_cachescope.cli.traffic.claude_code import ClaudeCodeSession
from vllm_cachescope.cli.traffic.claude_code import is_record as is_claude_code
from vllm_cachescope.cli.traffic.codex import CodexSession
from vllm_cachescope.cli.traffic.codex import is_record as is_codex
from vllm_cachescope.cli.traffic.envelope import Envelope, envelope_of, text_of
from vllm_cachescope.cli.traffic.records import STANDARD_INPUT, read_records
from vllm_cachescope.cli.traffic.texts import text_request
from vllm_cachescope.cli.traffic.times import seconds_of

EXPECTED = (
    "expected request bodies of Messages, Chat, Responses, Completions or Bedrock's Converse, by "
    "themselves or in envelopes (JSON lines, an array or a document); a log of LiteLLM or "
    "OpenRouter, a HAR or mitmproxy's flows, OpenTelemetry spans, a session file of Claude Code or "
    "Codex; or a text or block trace"
)


def read_traffic(path: Path, left_out: list[LeftOut] | None = None) -> list[Call] | list[BlockCall]:
    """Return the calls in a file, in the order in which they were made.

    Args:
        path: the file; ``-`` for standard input.
        left_out: takes the lines that cannot be understood and the requests that their server
            refused, if the others are to be read; None for an error on the first of them.

    Raises:
        OSError: if the file cannot be read.
        TrafficError: on a line that cannot be understood, with its number; if nothing in the file
            can.
    """
    skipped: list[LeftOut] = []
    calls: list[Call] = []
    block_calls: list[BlockCall] = []
    for call in stream_traffic(path, skipped):
        if skipped and left_out is None:
            break
        if isinstance(call, Call):
            calls.append(call)
        else:
            block_calls.append(call)
    if skipped and left_out is None:
        raise TrafficError(str(skipped[0]))
    if left_out is not None:
        left_out += skipped
    if skipped and not calls and not block_calls:
        more = f" (and {len(skipped) - 1:,} more lines)" if len(skipped) > 1 else ""
        raise TrafficError(f"{skipped[0]}{more}; {EXPECTED}")
    if calls and block_calls:
        raise TrafficError(f"{path}: holds both requests and block hashes; use two files")
    if block_calls:
        return sorted(block_calls, key=lambda call: call.at)
    # Recorders write a call when it ends; what it could reuse depends on when it began.
    if all(call.at is not None for call in calls):
        calls.sort(key=lambda call: call.at or 0.0)
    return calls


def stream_traffic(path: Path, left_out: list[LeftOut]) -> Generator[Call | BlockCall]:
    """Yield the calls in a file one by one, in the order in which they stand there.

    Args:
        path: the file; ``-`` for standard input.
        left_out: takes the lines that cannot be understood, and the requests that their server
            refused, as they are passed.

    Raises:
        OSError: if the file cannot be read.
        TrafficError: if it is damaged.
    """
    if (flows := _mitmproxy_file(path)) is not None:
        for i, envelope in enumerate(mitmproxy.envelopes(flows), 1):
            yield from _body(f"{path}:{i}", envelope, left_out)
        return
    claude_code, codex = ClaudeCodeSession(), CodexSession()
    session_file = False
    for source, record in read_records(path, left_out):
        if not isinstance(record, Mapping):
            left_out.append(LeftOut(source, "not an object"))
        elif is_claude_code(record):
            session_file = True
            yield from claude_code.read(source, record)
        elif is_codex(record):
            session_file = True
            yield from codex.read(source, record)
        elif session_file and "type" in record:
            continue  # What else an agent notes: titles, snapshots of files.
        else:
            yield from _of_record(source, record, left_out)
    yield from codex.end()


def _of_record(
    source: str, record: Mapping[str, Any], left_out: list[LeftOut]
) -> Iterator[Call | BlockCall]:
    if isinstance(record.get("hash_ids"), list):
        try:
            yield block_call(source, record)
        except TrafficError as error:
            left_out.append(_left_out(source, error))
        return
    text = record.get("input")
    if isinstance(text, str) and "model" not in record:
        at, session = seconds_of(record.get("timestamp")), text_of(record.get("session_id"))
        output = text_of(record.get("output"))
        yield Call(source, at, session, text_request(text), text=text, output=output)
        return
    if record.get("type") in ("summary", "file-history-snapshot", "queue-operation"):
        return  # A session file of Claude Code may begin with them.
    found: Iterator[Envelope]
    if har.is_record(record):
        found = har.envelopes(record)
    elif opentelemetry.is_record(record):
        found = opentelemetry.envelopes(record)
    elif litellm.is_record(record):
        logged = litellm.envelope(record)
        found = iter(() if logged is None else (logged,))
    else:
        yield from _body(source, envelope_of(record), left_out)
        return
    first = next(found, None)
    for i, envelope in enumerate(chain(() if first is None else (first,), found), 1):
        one = source if litellm.is_record(record) else f"{source}#{i}"
        yield from _body(one, envelope, left_out)


def _body(source: str, envelope: Envelope, left_out: list[LeftOut]) -> Iterator[Call]:
    try:
        if (call := body_call(source, envelope)) is not None:
            yield call
    except NoRequestError as error:
        left_out.append(_left_out(source, error))
    except TrafficError as error:
        left_out.append(_left_out(source, error, refused=True))


def _left_out(source: str, error: TrafficError, refused: bool = False) -> LeftOut:
    return LeftOut(source, str(error).removeprefix(f"{source}: "), refused)


def _mitmproxy_file(path: Path) -> bytes | None:
    """Return the bytes of a flow file of mitmproxy; None for any other file."""
    if path == STANDARD_INPUT:
        return None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(32)
            return head + file.read() if mitmproxy.is_file(head) else None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return None  # `read_records` says so.
