"""Two engines on one Redis, which publish KV events."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK_BYTES, Answer, Ask
from tests.redis.replica import Replica
from tests.redis.servers import RedisServer, entries, wait_until
from tests.routers.stream import EventStream
from vllm_cachescope.connectors.vllm import shm_regions

GREEDY, GREEDY_BLOCKS = "name:greedy", 6
"""The one organisation with quotas, and how many blocks it may hold on each tier."""


@dataclass
class Worker:
    """An engine, and what routers learn of it.

    Attributes:
        engine: the engine.
        events: what it publishes.
        resident: the hashes that its device and its CPU tier held when `settle` was last called.
    """

    engine: Replica
    events: EventStream
    resident: dict[str, set[int]] = field(default_factory=dict)

    def run(self, *asks: Ask) -> list[Answer]:
        """Put all ``asks`` to the engine at once; return its answers in their order."""
        return self.engine.run(*asks)

    def settle(self) -> None:
        """Wait until the routers that know tiers agree with the engine on what it holds."""
        wait_until(self._swept_and_agrees)
        assert self.events.twice == [], self.events.twice

    def empty(self) -> None:
        """Empty all tiers."""
        self.engine.call("command_purge", b"", "all")
        wait_until(lambda: self.engine.call("command_purged", "all") is not None)
        wait_until(self._is_empty)

    def _swept_and_agrees(self) -> bool:
        # An idle engine tells what has happened since when it is swept, as a server does.
        self.engine.call("command_sweep")
        return self.agrees()

    def _is_empty(self) -> bool:
        is_empty = self._swept_and_agrees() and not any(self.resident.values())
        return is_empty and not self.events.llmd.held("STORAGE")

    def agrees(self) -> bool:
        """Whether the routers that know tiers agree with the engine on what it holds. Of what
        nothing stands in front of they may not have been told: it serves no prompt."""
        self.resident = self.engine.call("event_hashes")
        self.events.read()
        usable = self.usable()
        return all(
            usable[medium] <= reader.held(medium) <= held
            for medium, held in self.resident.items()
            for reader in (self.events.llmd, self.events.dynamo)
        )

    def usable(self) -> dict[str, set[int]]:
        """Return what of `resident` has all that stands in front of it, on whichever medium."""
        there = set().union(*self.resident.values()) | self.events.llmd.held("STORAGE")
        reached = self.events.reached(there)
        return {medium: held & reached for medium, held in self.resident.items()}


@dataclass
class Fleet:
    """Two workers and the Redis that they share."""

    server: RedisServer
    a: Worker
    b: Worker

    def stored(self) -> set[int]:
        """Return the hashes of what the Redis holds, as KV events write them."""
        names = entries(self.server)
        return {int(name[-24:-8], 16) for name in names}

    def told(self) -> set[int]:
        """Return the hashes of what the engines say to have stored there."""
        for worker in (self.a, self.b):
            worker.events.read()
        return self.a.events.llmd.held("STORAGE") | self.b.events.llmd.held("STORAGE")

    def empty(self) -> None:
        """Empty all tiers."""
        for worker in (self.a, self.b):
            worker.empty()
        wait_until(lambda: self.told() == self.stored() == set())


@contextmanager
def running_fleet(scratch: Path) -> Iterator[Fleet]:
    """Start two engines on a Redis of their own.

    Args:
        scratch: where all of them may write.
    """
    model = build(MODELS / "tiny", TINY)
    server = RedisServer(scratch)
    quota = {"orgs": {GREEDY: {"quota": GREEDY_BLOCKS * BLOCK_BYTES}}}
    config = {
        "tiers": [{"type": "redis", "url": server.url, "load_deadline": "2s", "timeout": "2s"}],
        "quotas": dict.fromkeys(("device", "cpu", "redis"), quota),
    }
    workers = [_worker(model, scratch / name, config) for name in "ab"]
    workers[1].events.parents = workers[0].events.parents
    try:
        for worker in workers:
            worker.events.await_first(
                # Each time other tokens: what is cached already is not told again.
                lambda number, engine=worker.engine: engine.run(Ask([300 + number] * 200, None))
            )
            worker.empty()
            # What was told before the first event that arrived is read by the time that this is.
            worker.run(Ask([299] * 200, None))
            wait_until(lambda worker=worker: worker.agrees() and any(worker.resident.values()))
            worker.empty()
            worker.events.forget()
        yield Fleet(server, *workers)
    finally:
        for worker in workers:
            worker.engine.stop()
            worker.events.close()
        shm_regions.remove_stale()
        server.close()


def _worker(model: Path, scratch: Path, config: dict[str, object]) -> Worker:
    scratch.mkdir()
    events = EventStream()
    return Worker(Replica(model, scratch, config, kv_events_config=events.config), events)
