"""The drive: agents make their calls through a router, and what came back is summed up."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.fleet.engine import FrontEnd
from benchmarks.fleet.load import Prompt
from benchmarks.fleet.router import ROUTED_HEADER, SESSION_HEADER, Choose, tenant_fields
from demo.client import MODEL, Answer

_TRIES, _PAUSE_S = 40, 0.5
"""How often a call is made that a router refuses (5xx), and after which pause: a router may take a
moment to know its replicas."""


def asking(front_end: FrontEnd, has_marks: bool, choose: Choose) -> "Asking":
    """Return what puts prompts to a fleet; see `Asking`."""
    limits = httpx.Limits(max_connections=None)
    return Asking(front_end, has_marks, choose, httpx.Client(timeout=600, limits=limits))


@dataclass(frozen=True, slots=True)
class Asking:
    """Puts prompts to a fleet, and streams the answers.

    Attributes:
        front_end: of the replicas.
        has_marks: whether breakpoints are sent.
        choose: where a call goes.
        client: the connections.
        routed: what the router said of where the session's call of that number went.
    """

    front_end: FrontEnd
    has_marks: bool
    choose: Choose
    client: httpx.Client
    routed: dict[tuple[str, int], str] = field(default_factory=dict)

    def __call__(self, prompt: Prompt, number: int = 0) -> Answer:
        """Put the session's prompt of that number to the fleet.

        Raises:
            RuntimeError: if the answer is an error or empty.
        """
        chat = prompt.chat
        if not self.has_marks:
            chat = json.loads(json.dumps(chat), object_hook=_unmarked)
        headers, fields = tenant_fields(self.front_end, prompt.call.tenant)
        body = {
            **{"model": MODEL, "max_tokens": 8, "temperature": 0.0, "stream": True},
            **{"stream_options": {"include_usage": True}, **chat, **fields},
        }
        headers = headers | {SESSION_HEADER: prompt.session}
        url = f"{self.choose(prompt.call, number)}/v1/chat/completions"
        for left in reversed(range(_TRIES)):
            start, ttft_s, usage = time.perf_counter(), None, None
            with self.client.stream("POST", url, json=body, headers=headers) as answer:
                if answer.status_code >= 500 and left:
                    answer.read()
                    time.sleep(_PAUSE_S)
                    continue
                if answer.status_code != 200:
                    raise RuntimeError(f"{url}: {answer.status_code} {answer.read()[:300]!r}")
                if (routed := answer.headers.get(ROUTED_HEADER)) is not None:
                    self.routed[prompt.call.session, number] = routed
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if ttft_s is None and _has_text(event):
                        ttft_s = time.perf_counter() - start
                    usage = event.get("usage") or usage
            break
        if ttft_s is None or usage is None:
            raise RuntimeError(f"{url}: the answer is empty")
        read = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(ttft_s, "", read, 0, usage["prompt_tokens"] - read)


def _unmarked(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("cache_control", None)
    return fields


def _has_text(event: dict[str, Any]) -> bool:
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
    return any(
        delta.get(name)
        for delta in deltas
        for name in ("content", "tool_calls", "reasoning_content")
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the load.

    Attributes:
        prompts: prompt tokens in all, as the fleet counted them.
        read: of these, how many were read from a cache.
        ttft_s: of each call, the time to its first token, in seconds.
        seconds: from the first call to the last answer.
        reads: by session, as the load names it, what each of its calls read.
    """

    prompts: int
    read: int
    ttft_s: tuple[float, ...]
    seconds: float
    reads: dict[str, list[int]]


def drive(load: Sequence[Sequence[Prompt]], ask: Asking) -> Outcome:
    """Have all sessions make their calls, each one after the answer to the one before."""

    def run(session: Sequence[Prompt]) -> list[Answer]:
        answers = []
        for number, prompt in enumerate(session):
            time.sleep(prompt.call.pause_s)
            answers.append(ask(prompt, number))
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(len(load)) as pool:
        answered = list(pool.map(run, load))
    seconds = time.perf_counter() - start
    answers = [answer for session in answered for answer in session]
    return Outcome(
        prompts=sum(answer.prompt_tokens for answer in answers),
        read=sum(answer.read for answer in answers),
        ttft_s=tuple(answer.ttft_s for answer in answers),
        seconds=seconds,
        reads={
            session[0].call.session: [answer.read for answer in told]
            for session, told in zip(load, answered, strict=True)
            if session
        },
    )
