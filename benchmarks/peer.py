"""The peer: plain vLLM with LMCache's multi-process server behind it, and Redis behind that."""

import json
import sys
from pathlib import Path

import httpx

from benchmarks import harness
from demo.server import Server, free_port


class LMCacheServer(Server):
    """LMCache's server with a Redis as its second level.

    Args:
        redis_port: the Redis.
    """

    health = "/healthcheck"

    def __init__(self, redis_port: int) -> None:
        second_level = {"type": "resp", "host": "127.0.0.1", "port": redis_port, "num_workers": 4}
        http_port = free_port()
        command = [
            *(str(Path(sys.executable).with_name("lmcache")), "server"),
            *("--supported-transfer-mode", "engine_driven"),
            *("--chunk-size", str(harness.BLOCK), "--l1-size-gb", "2", "--eviction-policy", "LRU"),
            *("--l2-adapter", json.dumps(second_level)),
            *("--http-port", str(http_port), "--prometheus-port", str(free_port())),
        ]
        super().__init__(command, {"LMCACHE_TRACK_USAGE": "false"})
        self._port = int(self.url.rpartition(":")[2])
        self.url = f"http://127.0.0.1:{http_port}"

    def engine(self) -> Server:
        """Return a plain vLLM that caches in this server, which must be running."""
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._port,
            },
        }
        return harness.server(False, "--kv-transfer-config", json.dumps(transfer))

    def empty(self) -> None:
        """Empty its first level, its memory."""
        httpx.post(f"{self.url}/cache/clear", json={"tier": "l1"}, timeout=60).raise_for_status()
