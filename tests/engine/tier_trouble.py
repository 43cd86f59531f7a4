"""What befalls a Redis behind a server of the tests, one trouble at a time."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.redis.servers import Proxy, RedisServer


class TierTrouble:
    """A Redis and the way to it, both of which fail now and then, each time for a moment.

    Args:
        directory: where the Redis may write.
    """

    def __init__(self, directory: Path) -> None:
        self._server = RedisServer(directory)
        self._proxy = Proxy(self._server.port)
        self._one = threading.Lock()

    @property
    def tiers(self) -> list[dict[str, Any]]:
        """The configuration of the tier, which is tried again soon after it has failed."""
        probes = {"first_probe": "50ms", "longest_probe": "200ms"}
        return [{"type": "redis", "url": self._proxy.url, **probes}]

    def draw(self, chance: random.Random) -> Callable[[], None]:
        """Draw a trouble; what is returned brings it about and ends it."""
        kinds = [self._hanging, self._cut_off, self._slow, self._full, self._restarted]
        trouble = chance.choice(kinds)
        lasts_s, much = chance.uniform(0.05, 0.8), chance.randrange(100_000)

        def befall() -> None:
            # Two at once would end each other.
            if not self._one.acquire(blocking=False):
                return
            try:
                with trouble(much):
                    time.sleep(lasts_s)
            finally:
                self._one.release()

        return befall

    def stored(self) -> int:
        """Return how many keys the Redis holds."""
        return int(self._server.client.dbsize())

    def close(self) -> None:
        """Get rid of it."""
        self._proxy.close()
        self._server.close()

    @contextmanager
    def _hanging(self, _: int) -> Iterator[None]:
        self._server.stop()
        yield
        self._server.resume()

    @contextmanager
    def _cut_off(self, after: int) -> Iterator[None]:
        self._proxy.cut_after = after
        yield
        self._proxy.cut_after = None

    @contextmanager
    def _slow(self, chunk: int) -> Iterator[None]:
        self._proxy.chunk, self._proxy.pause_s = 1 + chunk, 0.05
        yield
        self._proxy.chunk = None

    @contextmanager
    def _full(self, _: int) -> Iterator[None]:
        with redis.Redis(port=self._server.port) as client:
            client.config_set("maxmemory", 1)
            yield
            client.config_set("maxmemory", 0)

    @contextmanager
    def _restarted(self, _: int) -> Iterator[None]:
        self._server.kill()
        yield
        self._server.start()
