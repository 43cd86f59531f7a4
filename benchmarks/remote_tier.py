"""How soon a prompt is served from Redis, next to the same vLLM with LMCache in front of the same
Redis and to computing it again; how fast blocks move; and what a faulty or dead Redis costs."""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import (
    BLOCK,
    Result,
    arguments,
    console,
    finish,
    pairs,
    prompt,
    server,
)
from benchmarks.overhead import add_rates, compare_rates, filled
from benchmarks.peer import LMCacheServer
from benchmarks.redis_clients import Client, Native, Ours, RedisPy
from demo.client import AnthropicClient, empty_device_cache
from demo.model import SMALL
from demo.server import Server, free_port
from tests.redis.servers import Proxy, RedisServer, wait_until

SECRET = "the secret of the benchmarks"
BLOCK_BYTES = BLOCK * 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 4
"""Keys and values of one block, in float32."""

MOVED_BLOCKS = 160
"""Blocks moved at once by the clients, as many as a prompt of 20,000 tokens has."""

TURNS = 3
"""Measurements per pair and side; the fastest counts, since whatever else runs only ever adds."""


class Side:
    """A vLLM whose cache reaches back to Redis.

    Args:
        engine: the server.
        redis: the Redis behind it.
        empty_memory: empties what stands between the engine and Redis.
    """

    def __init__(
        self, engine: Server, redis: RedisServer, empty_memory: Callable[[], None] = lambda: None
    ) -> None:
        self._url = engine.url
        self._client = AnthropicClient(engine.url, "benchmark")
        self._redis = redis.client
        self._empty_memory = empty_memory

    def compute(self, body: dict[str, Any]) -> float:
        """Have a prompt computed and stored; return the seconds to its first token."""
        stored = self._stored()
        answer = self._client.ask(body, "s", max_tokens=1)
        if answer.read:
            raise RuntimeError(f"{answer.read} tokens of a new prompt were read")
        self._whole = (answer.prompt_tokens - 1) // BLOCK * BLOCK
        wait_until(lambda: self._stored() >= stored + answer.prompt_tokens // BLOCK, 30)
        return answer.ttft_s

    def hit(self, body: dict[str, Any]) -> float:
        """Have the prompt that was computed last read from Redis; return the seconds to its first
        token.

        Raises:
            RuntimeError: if not every whole block of it came from Redis.
        """
        empty_device_cache(self._url, connector=True)
        self._empty_memory()
        sent = self._sent_bytes()
        answer = self._client.ask(body, "s", max_tokens=1)
        blocks = (self._sent_bytes() - sent) // BLOCK_BYTES
        if answer.read != self._whole or blocks != self._whole // BLOCK:
            raise RuntimeError(
                f"of {self._whole} tokens {answer.read} were read, {blocks * BLOCK} from Redis"
            )
        return answer.ttft_s

    def miss(self, body: dict[str, Any]) -> float:
        """Ask for the prompt that was computed last where Redis cannot give all of it; return the
        seconds to its first token."""
        empty_device_cache(self._url, connector=True)
        self._empty_memory()
        answer = self._client.ask(body, "s", max_tokens=1)
        if answer.read == self._whole:
            raise RuntimeError("all of it was read, in spite of the fault")
        return answer.ttft_s

    def _stored(self) -> int:
        """Return how many blocks Redis holds."""
        pipeline = self._redis.pipeline(transaction=False)
        for name in self._redis.scan_iter(count=10_000, _type="string"):
            pipeline.strlen(name)
        return sum(length >= BLOCK_BYTES for length in pipeline.execute())

    def _sent_bytes(self) -> int:
        return int(self._redis.info("stats")["total_net_output_bytes"])


def move_blocks(result: Result, count: int, directory: Path) -> None:
    """Add how fast blocks go to Redis and come back, ours beside the public clients."""
    console.print("remote_tier: blocks to Redis and back")
    moved = MOVED_BLOCKS * BLOCK_BYTES
    source = memoryview(bytearray(random.Random(0).randbytes(BLOCK_BYTES) * MOVED_BLOCKS))
    blocks = [source[i : i + BLOCK_BYTES] for i in range(0, moved, BLOCK_BYTES)]
    rates: dict[str, dict[str, list[float]]] = {"store": {}, "load": {}}
    with closing(RedisServer(directory)) as redis:
        ours = Ours(redis.url, MOVED_BLOCKS, BLOCK_BYTES)
        public = RedisPy(redis.port, ours.names), Native(redis.port, ours.names, BLOCK_BYTES)
        clients: list[Client] = [ours, *public]

        def store(client: Client) -> float:
            redis.client.flushall()
            return _rate(moved, lambda: client.store(blocks))

        def load(client: Client) -> float:
            rate = _rate(moved, client.load)
            if any(a != b for a, b in zip(client.loaded(), blocks, strict=True)):
                raise RuntimeError(f"{client.name} has not loaded what was stored")
            return rate

        # One round more, in which memory is touched for the first time.
        for number in range(-1, count):
            for what, move in (("store", store), ("load", load)):
                turns: dict[str, list[float]] = {client.name: [] for client in clients}
                for turn in range(TURNS):
                    order = clients if (number + turn) % 2 == 0 else clients[::-1]
                    for client in order:
                        turns[client.name].append(move(client))
                if number >= 0:
                    for name, measured in turns.items():
                        rates[what].setdefault(name, []).append(max(measured))
                redis.client.flushall()
                ours.store(blocks)
        for client in clients:
            client.close()
    for what, by_client in rates.items():
        for name, values in by_client.items():
            result.add(f"{what}, {name}", values, "GB/s")
        mine = by_client.pop(ours.name)
        fastest = [max(others) for others in zip(*by_client.values(), strict=True)]
        result.add(
            f"{what}, over the fastest public client",
            [one / other for one, other in zip(mine, fastest, strict=True)],
            "×",
            "at least 0.7",
            lambda ratio: ratio >= 0.7,
        )


def _rate(moved: int, move: Callable[[], None]) -> float:
    start = time.perf_counter()
    move()
    return moved / (time.perf_counter() - start) / 1e9


def serve_hits(result: Result, count: int, directory: Path) -> None:
    """Add how soon prompts are served from Redis, with the plugin and with the peer."""
    console.print("remote_tier: servers with the plugin and with LMCache, on one Redis")
    with closing(RedisServer(directory)) as redis:
        tiers = [{"type": "redis", "url": redis.url}]
        with (
            LMCacheServer(redis.port) as lmcache,
            lmcache.engine() as behind_lmcache,
            server(True, cpu_bytes="1GiB", secret=SECRET, tiers=tiers) as plugin,
        ):
            sides = Side(plugin, redis), Side(behind_lmcache, redis, lmcache.empty)
            for side in sides:
                body = prompt("warm-up", tokens=5_000)
                side.compute(body)
                side.hit(body)
            for tokens in (5_000, 20_000):
                _serve_hits(result, count, tokens, *sides, redis)


def _serve_hits(
    result: Result, count: int, tokens: int, ours: Side, peer: Side, redis: RedisServer
) -> None:
    computed: list[float] = []
    hits: dict[Side, list[float]] = {ours: [], peer: []}
    redis.client.flushall()
    # The peer's prompt stays the same: which one it is makes no difference to its hits, and
    # computing 20,000 tokens takes long.
    peers_body = prompt(f"peer {tokens}", tokens=tokens)
    peer.compute(peers_body)
    for number in range(count):
        body = prompt(f"pair {number} {tokens}", tokens=tokens)
        computed.append(1000 * ours.compute(body))
        in_turn = pairs(TURNS, lambda _, body=body: ours.hit(body), lambda _: peer.hit(peers_body))
        for side, seconds in zip((ours, peer), zip(*in_turn, strict=True), strict=True):
            hits[side].append(1000 * min(seconds))
    name = f"{tokens:,} tokens"
    result.add(f"{name}: first token, computed", computed, "ms")
    result.add(f"{name}: first token, from Redis", hits[ours], "ms")
    result.add(f"{name}: first token, LMCache from Redis", hits[peer], "ms")
    result.add(
        f"{name}: Redis over LMCache from Redis",
        [one / other for one, other in zip(hits[ours], hits[peer], strict=True)],
        "×",
        "at most 0.3",
        lambda ratio: ratio <= 0.3,
    )
    result.add(
        f"{name}: computed over Redis",
        [cold / hit for cold, hit in zip(computed, hits[ours], strict=True)],
        "×",
        "at least 5",
        lambda ratio: ratio >= 5,
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a Redis while a prompt that it holds is asked for.

    Attributes:
        name: what happens.
        begin: lets it happen.
        end: undoes it.
    """

    name: str
    begin: Callable[[], None]
    end: Callable[[], None]


def faults(redis: RedisServer, proxy: Proxy) -> list[Fault]:
    """Return what can happen to ``redis``, which engines reach through ``proxy``."""

    def drip(chunk: int | None) -> None:
        proxy.chunk, proxy.pause_s = chunk, 0.01

    return [
        Fault("hangs", redis.stop, redis.resume),
        Fault("is killed", redis.kill, redis.start),
        Fault("sends 1 kB each 10 ms", lambda: drip(1000), lambda: drip(None)),
    ]


def serve_under_faults(result: Result, count: int, directory: Path) -> None:
    """Add what a fault of Redis adds to the first token of a prompt that Redis holds, over a prompt
    that no tier holds."""
    console.print("remote_tier: faults of Redis")
    with closing(RedisServer(directory)) as redis, closing(Proxy(redis.port)) as proxy:
        tiers = [{"type": "redis", "url": proxy.url, "first_probe": "50ms"}]
        with server(True, cpu_bytes="1GiB", secret=SECRET, tiers=tiers) as plugin:
            side = Side(plugin, redis)
            side.compute(prompt("warm-up", tokens=2_000))
            for fault in faults(redis, proxy):
                added = [_added(side, fault, f"{fault.name} {n}", plugin) for n in range(count)]
                result.add(
                    f"added to the first token: Redis {fault.name}",
                    added,
                    "ms",
                    "at most the deadline, 250 ms",
                    lambda milliseconds: milliseconds <= 250,
                )


def _added(side: Side, fault: Fault, label: str, plugin: Server) -> float:
    """Return how many milliseconds later a first token comes if ``fault`` happens, the fastest of
    `TURNS` prompts against the fastest."""
    computed, missed = [], []
    for turn in range(TURNS):
        # Short, so that how long computing happens to take says little.
        body = prompt(f"{label} {turn}", tokens=2_000)
        computed.append(side.compute(body))
        fault.begin()
        try:
            missed.append(side.miss(body))
        finally:
            fault.end()
        wait_until(lambda: _is_up(plugin), 30)
    return 1000 * (min(missed) - min(computed))


def _is_up(plugin: Server) -> bool:
    health = httpx.get(f"{plugin.url}/cachescope/health", timeout=60).json()
    (tier,) = [tier for tier in health["tiers"] if tier["name"] == "redis"]
    return bool(tier["up"])


def serve_beside_a_dead_tier(result: Result, count: int) -> None:
    """Add what a Redis that is not there costs the requests that do not need it."""
    console.print("remote_tier: pairs of servers, without a remote tier and with a dead one")
    tiers = [{"type": "redis", "url": f"redis://127.0.0.1:{free_port()}"}]
    rates = []
    for number in range(count):
        dead = server(True, secret=SECRET, tiers=tiers)
        with filled(server(True), dead, first=number) as clients:
            rates.append(compare_rates(clients))
    add_rates(result, rates, "no remote tier", "dead Redis", least=0.98)


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=5)
    result = Result("remote_tier", options.quick)
    with tempfile.TemporaryDirectory(prefix="cachescope-") as directory:
        move_blocks(result, options.pairs, Path(directory))
        serve_hits(result, options.pairs, Path(directory))
        serve_under_faults(result, options.pairs, Path(directory))
    serve_beside_a_dead_tier(result, options.pairs)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
