"""What a client's session has shown: what it marks, how it is known, what it read."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from clients.desk import TEXT
from clients.recorder import Exchange
from demo.client import Metrics
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.tenancy.caller import SESSION_HEADERS
from vllm_cachescope.wire import READERS, protocol_of

_TTLS = (300, 1800, 3600, 43200, 86400)
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class Findings:
    """What one client did, and what became of it.

    Attributes:
        paths: the endpoints that it used.
        requests: how many requests for answers it made.
        prompt_tokens: their length, as the server counted it.
        read: how many of those came from the cache.
        resumed: prompt and read tokens of the last request, which resumes the session.
        marks: places of markers, each with the number of requests that have it.
        session: what names its session.
        faults: what should not be; empty if all is well.
    """

    paths: tuple[str, ...]
    requests: int
    prompt_tokens: int
    read: int
    resumed: Counter[str]
    marks: Counter[str]
    session: str
    faults: tuple[str, ...]


def find(
    exchanges: Sequence[Exchange], metrics: Metrics, unexplained: int, breaks: Sequence[Any]
) -> Findings:
    """Return what a client's session has shown.

    Args:
        exchanges: all that passed between it and the server.
        metrics: what /metrics counted meanwhile.
        unexplained: tokens that meanwhile were lost for no known reason.
        breaks: the breaks of the client's organisation.
    """
    asked = [
        exchange
        for exchange in exchanges
        if protocol_of(exchange.path) is not None and isinstance(exchange.body, dict)
    ]
    sessions = {_session(exchange) for exchange in asked}
    told = [usage(exchange) for exchange in asked]
    counted = Counter(prompt=metrics.total(), read=metrics.total("read"))
    faults = [f"{e.path} {e.status}: {bytes(e.reply[:300])!r}" for e in asked if e.status != 200]
    if len(asked) < 3 or not any(TEXT in json.dumps(exchange.body) for exchange in asked):
        faults.append("no tool call, or no resumed session")
    if len(sessions) > 1:
        faults.append(f"{len(sessions)} sessions: {sorted(sessions)}")
    if (in_all := sum(told, Counter())) != +counted:
        faults.append(f"usage {dict(in_all)}, metrics {dict(counted)}")
    if unexplained:
        faults.append(f"{unexplained} tokens lost for no known reason")
    faults += [f"{b['cause']} at {b['where']}" for b in breaks if not b["expected"]]
    return Findings(
        paths=tuple(sorted({exchange.path for exchange in asked})),
        requests=len(asked),
        prompt_tokens=counted["prompt"],
        read=counted["read"],
        resumed=told[-1] if told else Counter(),
        marks=sum((Counter(set(_marks(exchange))) for exchange in asked), Counter()),
        session=", ".join(sorted({source for source, _ in sessions})),
        faults=tuple(faults),
    )


def _read(exchange: Exchange) -> PromptRequest:
    protocol = protocol_of(exchange.path)
    assert protocol is not None
    return READERS[protocol](exchange.body, _TTLS)


def _marks(exchange: Exchange) -> Iterator[str]:
    """Yield the places of the markers in a request, without the indices; ignored ones too."""
    request = _read(exchange)
    for part in request.parts:
        if part.mark is not None:
            yield _INDEX.sub("[]", part.mark.path)
    for marker in request.ignored:
        yield f"{_INDEX.sub('[]', marker.path)} ({marker.reason.value})"


def _session(exchange: Exchange) -> tuple[str, str]:
    """Return what names the session of a request, and its name."""
    for header in SESSION_HEADERS:
        if name := exchange.headers.get(header):
            return header, name
    session = _read(exchange).session
    if session is None:
        return "none", ""
    body = exchange.body
    for field in ("session_id", "prompt_cache_key"):
        if body.get(field) == session:
            return field, session
    return "metadata.user_id", session


_READ = {
    Protocol.MESSAGES: ("cache_read_input_tokens",),
    Protocol.CHAT: ("prompt_tokens_details", "cached_tokens"),
    Protocol.RESPONSES: ("input_tokens_details", "cached_tokens"),
}


def usage(exchange: Exchange) -> Counter[str]:
    """Return the prompt's tokens, and those read, as the reply tells its client."""
    protocol = protocol_of(exchange.path)
    assert protocol is not None
    told: dict[str, Any] = {}
    for reply in _objects(exchange.reply.decode(errors="replace")):
        for holder in (reply, reply.get("message"), reply.get("response")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                told = told | holder["usage"]
    read: Any = told
    for name in _READ[protocol]:
        read = (read or {}).get(name, 0)
    if protocol is Protocol.MESSAGES:
        prompt = sum(
            told.get(name, 0)
            for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        )
    else:
        prompt = told.get("prompt_tokens", told.get("input_tokens", 0))
    return Counter(prompt=prompt, read=read or 0)


def _objects(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a reply, streamed or not."""
    streamed = [line.removeprefix("data:") for line in reply.split("\n") if line[:5] == "data:"]
    for text in streamed or [reply]:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def read_breaks(url: str, key: str) -> list[dict[str, Any]]:
    """Return the breaks of the organisation with the key ``key``, the latest first."""
    answer = httpx.get(f"{url}/cachescope/breaks", headers={"x-api-key": key}, timeout=30)
    breaks: list[dict[str, Any]] = answer.raise_for_status().json()["breaks"]
    return breaks


def read_unexplained(url: str) -> int:
    """Return the tokens that were lost for no known reason, so far."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    lines = re.findall(r"^cachescope_unexplained_tokens_total\S* (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, lines)))
