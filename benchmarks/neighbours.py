"""What one client costs another on the same server: how long a stream stands still while somebody
sends a large body, next to plain vLLM, and what streams lose to somebody who purges in a loop."""

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from benchmarks.harness import Result, arguments, console, finish, pairs, server
from demo.client import MODEL

STREAM_TOKENS = 400
STREAMS = 4
WINDOW_S = 4.0
PER_SECOND = 50
"""Requests per second of the client that purges."""

HELD_MS = 50.0


def _message(text: str, parts: int) -> bytes:
    content = [{"type": "text", "text": text}] * parts
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": content}]
    return json.dumps({**body, "diagnostics": {"previous_message_id": "msg_none"}}).encode()


LARGE = {
    "100,000 parts of 20 bytes": lambda: _message("x" * 20, 100_000),
    "5,000 parts of 1 KB": lambda: _message("some words " * 93, 5_000),
    "one part of 120 MB": lambda: _message("some words " * 11_000_000, 1),
}
"""Bodies of the Messages format, made when they are sent. The server refuses all of them: they are
longer than what its model takes."""


def _stream(url: str, key: str, seen: Callable[[float], object]) -> None:
    """Have a server stream an answer; call ``seen`` with the time whenever some of it comes."""
    body = {
        "model": MODEL,
        "max_tokens": STREAM_TOKENS,
        "stream": True,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": f"Tell {key} a story."}],
    }
    headers = {"authorization": f"Bearer {key}"}
    path = f"{url}/v1/chat/completions"
    with httpx.stream("POST", path, json=body, headers=headers, timeout=600) as response:
        response.raise_for_status()
        for _ in response.iter_raw():
            seen(time.perf_counter())


def longest_pause_ms(url: str, large: bytes | None) -> float:
    """Return the longest time, in ms, for which a stream brings nothing, while another client sends
    ``large``; if that is None, while nobody sends anything.

    Raises:
        RuntimeError: if the other client was not answered while the stream ran.
    """
    came: list[float] = []
    sent_at = answered_at = 0.0
    stream = threading.Thread(target=_stream, args=(url, "bystander", came.append))
    stream.start()
    while len(came) < 20:
        if not stream.is_alive():
            raise RuntimeError("the stream was over before it began")
        time.sleep(0.001)
    if large is not None:
        sent_at = time.perf_counter()
        headers = {"x-api-key": "large", "content-type": "application/json"}
        httpx.post(f"{url}/v1/messages", content=large, headers=headers, timeout=600)
        answered_at = time.perf_counter()
    stream.join()
    if large is not None and sent_at > came[-1]:
        raise RuntimeError("the stream was over before the large body was sent")
    considered = [at for at in came[10:] if large is None or at <= answered_at + 0.2]
    return max(b - a for a, b in itertools.pairwise(considered)) * 1000


@contextmanager
def _busy(url: str, ask: Callable[[httpx.Client, int], object]) -> Iterator[None]:
    """Have a client send `PER_SECOND` requests in the meantime."""
    over = threading.Event()

    def send() -> None:
        number = 0
        with httpx.Client(base_url=url, headers={"x-api-key": "purging"}, timeout=60) as client:
            while not over.wait(1 / PER_SECOND):
                ask(client, number)
                number += 1

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield
    finally:
        over.set()
        sending.join()


def tokens_per_s(url: str, ask: Callable[[httpx.Client, int], object]) -> float:
    """Return how many tokens a second some streams bring while another client sends requests.

    Args:
        url: the server.
        ask: sends one of the requests; it is called with a client and the request's number.
    """
    came: list[float] = []
    start = time.perf_counter()

    def stream(number: int) -> None:
        while time.perf_counter() < start + WINDOW_S:
            _stream(url, f"bystander {number}", came.append)

    with _busy(url, ask), ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(stream, range(STREAMS)))
    return len(came) / (came[-1] - start)


def _purge(client: httpx.Client, number: int) -> None:
    client.post("/cachescope/purge", json={"session": f"made up {number}"})


def _look(client: httpx.Client, number: int) -> None:
    client.get("/cachescope/health")


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("neighbours", options.quick)
    console.print("neighbours: two servers, plain and with the plugin")
    with server(plugin=False) as plain, server(plugin=True) as plugin:
        for one in (plain, plugin):
            longest_pause_ms(one.url, None)
        for name, make in LARGE.items():
            large = make()
            pauses = pairs(
                options.pairs,
                lambda _, large=large: longest_pause_ms(plain.url, large),
                lambda _, large=large: longest_pause_ms(plugin.url, large),
            )
            result.add(f"{name}: longest pause, plain", [one for one, _ in pauses], "ms")
            result.add(f"{name}: longest pause, plugin", [other for _, other in pauses], "ms")
            result.add(
                f"{name}: plugin beyond plain",
                [other - one for one, other in pauses],
                "ms",
                f"at most {HELD_MS:.0f} ms",
                lambda ms: ms <= HELD_MS,
            )
        rates = pairs(
            options.pairs,
            lambda _: tokens_per_s(plugin.url, _look),
            lambda _: tokens_per_s(plugin.url, _purge),
        )
    result.add(
        f"tokens/s beside {PER_SECOND} purges a second, over those beside as many questions "
        "for its health",
        [other / one for one, other in rates],
        "×",
        "at least 0.9",
        lambda ratio: ratio >= 0.9,
    )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
