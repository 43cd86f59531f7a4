"""Two engines on one Redis, the second one through a proxy."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, BLOCK_BYTES, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import Proxy, RedisServer, entries, wait_until
from vllm_cachescope.connectors.vllm import shm_regions

GREEDY, GREEDY_BLOCKS = "name:greedy", 8
"""The one organisation with a quota, and how many blocks it may hold in the Redis."""


@dataclass
class Pair:
    """Two engines and what is between them.

    Attributes:
        server: the Redis they share.
        proxy: stands between the second engine and the server.
        a, b: the engines.
    """

    server: RedisServer
    proxy: Proxy
    a: Replica
    b: Replica
    _model: Path
    _scratch: Path
    _tier: dict[str, Any]
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def names(self) -> list[bytes]:
        """Return the names of the blocks the server holds."""
        return list(entries(self.server))

    def purged(self, engine: Replica, purge_id: str) -> dict[str, Any]:
        """Return what has become of a purge that ``engine`` was told of, once it is over. As its
        API process does, the other engine is asked meanwhile what it has heard of."""
        (other,) = {self.a, self.b} - {engine}
        while (answer := engine.call("command_purged", purge_id)) is None:
            other.call("command_heed", "the other one", 0)
        return answer

    def replace_b(self) -> None:
        """Kill the second engine and start another one in its place, in a fresh interpreter."""
        self.b.stop()
        scratch = self._scratch / "b again"
        self.b = _replica(self._model, scratch, self._tier, self.proxy.url, fresh=True)

    def heal(self) -> None:
        """End all that is wrong with the server, and wait until both engines write to it and read
        from it."""
        self.server.resume()
        self.proxy.chunk = self.proxy.cut_after = None
        self.server.client.config_set("maxmemory", 0)
        self.server.client.execute_command("ACL SETUSER default on nopass ~* +@all")
        # After a fault an engine tries again by and by; until it does, both ask something new.
        wait_until(lambda: self._shares(self.a, self.b), 30)
        wait_until(lambda: self._shares(self.b, self.a), 30)

    def fresh(self) -> None:
        """Do `heal`, and empty everything."""
        self.heal()
        self.server.client.flushall()
        for engine in (self.a, self.b):
            engine.call("empty")

    def _shares(self, writer: Replica, reader: Replica) -> bool:
        """Whether ``reader`` reads from the server what ``writer`` has just computed."""
        tokens = draw_tokens(self._chance, BLOCK + 1)
        writer.run(ask(tokens, ttl_s=5))
        time.sleep(0.05)
        (answer,) = reader.run(ask(tokens, ttl_s=5))
        return answer.outcome("read_redis") == BLOCK


def ask(tokens: list[int], org: str = "acme", ttl_s: int = 300) -> Ask:
    """Return a prompt all of which ``org`` shares."""
    return Ask(tokens, sealed(org_plan(org, tokens, ttl_s)))


@contextmanager
def running_pair(scratch: Path, **tier: Any) -> Iterator[Pair]:
    """Start two engines on a Redis of their own.

    Args:
        scratch: where all of them may write.
        tier: settings of the tier beyond its address.
    """
    model = build(MODELS / "tiny", TINY)
    server = RedisServer(scratch)
    proxy = Proxy(server.port)
    a = _replica(model, scratch / "a", tier, server.url)
    b = _replica(model, scratch / "b", tier, proxy.url)
    pair = Pair(server, proxy, a, b, model, scratch, tier)
    try:
        pair.a.ready()
        pair.b.ready()
        yield pair
    finally:
        pair.a.stop()
        pair.b.stop()
        shm_regions.remove_stale()
        server.close()
        proxy.close()


def _replica(
    model: Path, scratch: Path, tier: dict[str, Any], url: str, fresh: bool = False
) -> Replica:
    scratch.mkdir()
    probes = {"first_probe": "50ms", "longest_probe": "200ms"}
    config = {
        "tiers": [{"type": "redis", "url": url, **probes, **tier}],
        "quotas": {"redis": {"orgs": {GREEDY: {"quota": GREEDY_BLOCKS * BLOCK_BYTES}}}},
    }
    return Replica(model, scratch, config, fresh)
