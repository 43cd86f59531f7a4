"""Dynamo's own indexer, ``python -m dynamo.indexer``, at the end of an engine's KV events."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from demo.server import free_port
from tests.engine.engine import BLOCK
from tests.frontends.places import DYNAMO
from tests.redis.servers import wait_until

_MODEL = "toy"
_MEDIA = {"device": "GPU", "host_pinned": "CPU"}


class Indexer:
    """A running indexer that subscribes to engines.

    Args:
        url: where it answers.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def register(self, endpoint: str, instance: int = 1) -> None:
        """Have it subscribe to the events of an engine at ``endpoint``; return once it does."""
        body = {
            "instance_id": instance,
            "endpoint": endpoint,
            "model_name": _MODEL,
            "block_size": BLOCK,
        }
        httpx.post(f"{self._url}/register", json=body).raise_for_status()
        wait_until(lambda: instance in self._subscribed())

    def held(self, instance: int = 1) -> dict[str, set[int]]:
        """Return the hashes of the blocks that it believes an engine to hold, by medium."""
        held: dict[str, set[int]] = {medium: set() for medium in _MEDIA.values()}
        for indexed in self._get("dump").values():
            for entry in indexed["events"]:
                if entry["worker_id"] != instance:
                    continue
                stored = entry["event"]["data"].get("stored", {"blocks": ()})
                hashes = {block["block_hash"] for block in stored["blocks"]}
                held[_MEDIA[entry["storage_tier"]]] |= hashes
        return held

    def matched(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Return how many leading tokens it finds for a request."""
        body = {"token_ids": list(tokens), "model_name": _MODEL}
        if salt is not None:
            body["cache_salt"] = salt
        answer = httpx.post(f"{self._url}/query", json=body).raise_for_status().json()
        return max((it["longest_matched"] for it in answer["instances"].values()), default=0)

    def _subscribed(self) -> set[int]:
        return {
            worker["instance_id"]
            for worker in self._get("workers")
            if worker["listeners"]["0"]["status"] == "active"
        }

    def _get(self, path: str) -> Any:
        return httpx.get(f"{self._url}/{path}").raise_for_status().json()


@contextmanager
def running_indexer() -> Iterator[Indexer]:
    """Start an indexer."""
    port = free_port()
    command = [str(DYNAMO), "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_up() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/workers").status_code == 200
        return False

    try:
        wait_until(is_up)
        yield Indexer(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(10)
