"""Two engines work for a long time while everything that can be wrong with their Redis is."""

import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.engine.engine import BLOCK, Answer, Ask, draw_tokens
from tests.redis.pair import Pair, ask, running_pair
from tests.redis.replica import Replica
from tests.redis.servers import beside_engines, wait_until

pytestmark = pytest.mark.engine

TTL_S = 4
"""Of all blocks, so that what is left behind in Redis is soon gone; the engines' own clock stands
still unless it is told otherwise."""

MAX_PAUSE_S = 0.4
"""How long a server is dead, or hangs, at most: longer than a request waits for it."""

FLAT_BYTES = 16 << 20
"""What an engine's memory may grow by once it has warmed up: it still fills what it remembers of
the last 4,096 prompts, some KB each."""

CONNECTIONS = 11
"""To Redis: two engines have one each to ask, one to write, two to read and one to hear of purges,
and the test has one. How many there are at a moment may be fewer."""


@dataclass(frozen=True)
class Footprint:
    """What an engine's process holds."""

    threads: int
    files: int
    rss_bytes: int

    @classmethod
    def of(cls, replica: Replica) -> "Footprint":
        process = psutil.Process(replica.pid)
        with process.oneshot():
            return cls(process.num_threads(), process.num_fds(), process.memory_info().rss)


class Trouble:
    """Everything that can be wrong with a Redis, at random.

    Args:
        pair: whose Redis.
        chance: decides.
    """

    def __init__(self, pair: Pair, chance: random.Random) -> None:
        self._pair = pair
        self._chance = chance
        self._coming: list[str] = []
        self.seen: Counter[str] = Counter()

    def next(self) -> None:
        """Let something happen; each kind once before any comes again."""
        if not self._coming:
            self._coming = [name for name in dir(self) if name.startswith("_kind_")]
            self._chance.shuffle(self._coming)
        name = self._coming.pop()
        self.seen[name.removeprefix("_kind_")] += 1
        getattr(self, name)()

    def end(self) -> None:
        """Undo what lasts."""
        client = self._pair.server.client
        client.config_set("maxmemory", 0)
        client.execute_command("ACL SETUSER default on nopass ~* +@all")
        self._pair.proxy.chunk = self._pair.proxy.cut_after = None

    def _pause(self) -> None:
        time.sleep(self._chance.uniform(0, MAX_PAUSE_S))

    def _kind_killed(self) -> None:
        self._pair.server.kill()
        self._pause()
        self._pair.server.start()

    def _kind_hangs(self) -> None:
        self._pair.server.stop()
        self._pause()
        self._pair.server.resume()

    def _kind_flushed(self) -> None:
        self._pair.server.client.flushall()

    def _kind_full(self) -> None:
        self._pair.server.client.config_set("maxmemory-policy", "noeviction")
        self._pair.server.client.config_set("maxmemory", 1)

    def _kind_denied(self) -> None:
        right = self._chance.choice(("resetkeys", "-get", "-set", "-exists", "-pexpire"))
        self._pair.server.client.execute_command("ACL", "SETUSER", "default", right)

    def _kind_kicked(self) -> None:
        self._pair.server.client.client_kill_filter(_type="normal", skipme=True)

    def _kind_drips(self) -> None:
        self._pair.proxy.chunk = self._chance.choice((1, 1000, 30_000))
        self._pair.proxy.pause_s = 0.01

    def _kind_cut(self) -> None:
        self._pair.proxy.cut_after = self._chance.randrange(1_000_000)


class Workload:
    """Prompts that begin alike, and what the model says to each without any cache."""

    def __init__(self, pair: Pair, chance: random.Random) -> None:
        self._chance = chance
        prompts: list[list[int]] = []
        for _ in range(4):
            stem = draw_tokens(chance, chance.randrange(3, 8) * BLOCK)
            ends = (draw_tokens(chance, chance.randrange(1, 5 * BLOCK)) for _ in range(3))
            prompts += [stem + end for end in ends]
        self._prompts = [(tokens, pair.a.call("uncached", tokens)) for tokens in prompts]

    def draw(self) -> list[tuple[Ask, list[int]]]:
        """Return some requests and the tokens that each is to be answered with."""
        drawn = self._chance.choices(self._prompts, k=self._chance.randrange(1, 4))
        org = self._chance.choice(("acme", "other"))
        return [(ask(tokens, org, TTL_S), expected) for tokens, expected in drawn]


@pytest.fixture
def pair(tmp_path) -> Iterator[Pair]:
    with running_pair(tmp_path, load_deadline="150ms", timeout="300ms") as pair:
        yield pair


@pytest.mark.parametrize(
    "duration_s", [15, *(pytest.param(long_s, marks=pytest.mark.slow) for long_s in (60, 600))]
)
def test_long_and_troubled_work_is_exact_and_leaves_nothing_behind(pair, duration_s):
    chance = random.Random(duration_s)
    workload = Workload(pair, chance)
    trouble = Trouble(pair, chance)
    sources: Counter[str] = Counter()
    engines = (pair.a, pair.b)

    def work() -> None:
        """Let both engines answer at once, while something may happen to their Redis."""
        drawn = [workload.draw() for _ in engines]
        begun = [
            engine.begin(*(one for one, _ in requests))
            for engine, requests in zip(engines, drawn, strict=True)
        ]
        if chance.random() < 0.5:
            trouble.next()
        for engine, requests, command in zip(engines, drawn, begun, strict=True):
            answers: list[Answer] = engine.wait(*command)
            for answer, (_, expected) in zip(answers, requests, strict=True):
                assert answer.tokens == expected
                sources["read_redis"] += answer.outcome("read_redis")
        if chance.random() < 0.3:
            trouble.end()
        for engine in engines:
            match chance.randrange(8):
                case 0 | 1:
                    engine.call("empty")
                case 2:
                    engine.call("empty_device")
                case 3:
                    engine.call("advance", chance.uniform(0, 2 * TTL_S))

    warm_s = duration_s / 4
    began = time.monotonic()
    while time.monotonic() < began + warm_s:
        work()
    pair.heal()
    before = [Footprint.of(engine) for engine in engines]
    threads, shared_memory = threading.active_count(), _regions()
    sizes: list[list[int]] = [[] for _ in engines]
    steps = 0
    while time.monotonic() < began + duration_s:
        work()
        steps += 1
        for engine, measured in zip(engines, sizes, strict=True):
            measured.append(Footprint.of(engine).rss_bytes)
    pair.heal()

    assert steps > duration_s / 10, "it hardly did anything"
    assert len(trouble.seen) == 8, trouble.seen
    assert sources["read_redis"] > duration_s * BLOCK / 10, "Redis was hardly read from"
    for engine, earlier, measured in zip(engines, before, sizes, strict=True):
        wait_until(lambda e=engine, was=earlier: Footprint.of(e).threads <= was.threads)
        # Connections that were being opened anew had no socket yet.
        sockets = CONNECTIONS // len(engines)
        wait_until(lambda e=engine, was=earlier, n=sockets: Footprint.of(e).files <= was.files + n)
        # On a busy machine the first steps still warm it up.
        settled = measured[len(measured) // 3 :]
        assert _growth(settled) < FLAT_BYTES, measured
        (tier,) = [t for t in engine.call("command_health") if t["name"] == "redis"]
        assert tier["up"] and tier["readable"] and tier["writable"]
        assert tier["loading_bytes"] == tier["storing_bytes"] == 0
    wait_until(lambda: _connections(pair) <= CONNECTIONS)
    # Those of this process that may have come are the proxy's: two for each connection through it.
    wait_until(lambda: threading.active_count() <= threads + 2 * CONNECTIONS)
    assert _regions() <= shared_memory
    # Each entry goes with its lifetime, and so does all that stands beside it.
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not _left(pair), 2 * TTL_S + 10)
    assert not _left(pair)


def _connections(pair: Pair) -> int:
    return len(pair.server.client.client_list())


def _left(pair: Pair) -> set[bytes]:
    """Return the names that the server has, but for what stays as long as the engines."""
    return set(pair.server.client.keys()) - beside_engines(pair.server)


def _regions() -> set[Path]:
    return set(Path("/dev/shm").glob("vllm_offload_*.mmap*"))


def _growth(sizes: list[int]) -> float:
    """Return by how much a line through ``sizes`` rises from its first to its last point."""
    slope, _ = statistics.linear_regression(range(len(sizes)), sizes)
    return slope * len(sizes)
