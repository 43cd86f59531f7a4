"""The peer: plain vLLM with LMCache's multi-process server behind it, and Redis behind that if it
is to have one."""

import json
import sys
from pathlib import Path

import httpx

from benchmarks import harness
from demo.server import Server, free_port


class LMCacheServer(Server):
    """LMCache's server.

    Args:
        redis_port: the Redis that is its second level; None for none.
        memory_gb: its memory, in GB.
    """

    health = "/healthcheck"

    def __init__(self, redis_port: int | None = None, memory_gb: float = 2) -> None:
        second_level = {"type": "resp", "host": "127.0.0.1", "port": redis_port, "num_workers": 4}
        http_port = free_port()
        command = [
            *(str(Path(sys.executable).with_name("lmcache")), "server"),
            *("--supported-transfer-mode", "engine_driven"),
            *("--chunk-size", str(harness.BLOCK), "--l1-size-gb", f"{memory_gb:.3f}"),
            *("--eviction-policy", "LRU"),
            *(() if redis_port is None else ("--l2-adapter", json.dumps(second_level))),
            *("--http-port", str(http_port), "--prometheus-port", str(free_port())),
        ]
        super().__init__(command, {"LMCACHE_TRACK_USAGE": "false"})
        self._port = int(self.url.rpartition(":")[2])
        self.url = f"http://127.0.0.1:{http_port}"

    def engine(self, *arguments: str) -> Server:
        """Return a plain vLLM that caches in this server, which must be running.

        Args:
            arguments: further ones for vLLM.
        """
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._port,
            },
        }
        return harness.server(False, "--kv-transfer-config", json.dumps(transfer), *arguments)

    def empty(self) -> None:
        """Empty its first level, its memory."""
        httpx.post(f"{self.url}/cache/clear", json={"tier": "l1"}, timeout=60).raise_for_status()
