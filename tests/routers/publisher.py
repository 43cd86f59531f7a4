"""A publisher of KV events that no engine has sent."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.engine.engine import BLOCK

Event = dict[str, Any]


def stored(medium: str, *chain: int, parent: int | None = None, salt: str = "") -> Event:
    """Return the event of blocks that follow each other; ``salt`` stands with the first."""
    return {
        "type": "BlockStored",
        "block_hashes": list(chain),
        "parent_block_hash": parent,
        "token_ids": [token for block in chain for token in [block % 50_000] * BLOCK],
        "block_size": BLOCK,
        "lora_id": None,
        "lora_name": None,
        "medium": medium,
        "extra_keys": [[salt] if salt else None, *[None] * (len(chain) - 1)],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def removed(medium: str, *blocks: int) -> Event:
    """Return the event of blocks that are gone."""
    return {
        "type": "BlockRemoved",
        "block_hashes": list(blocks),
        "medium": medium,
        "group_idx": 0,
    }


class Publisher:
    """Publishes as an engine does.

    Attributes:
        endpoint: where.
    """

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory / 'events'}"
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.bind(self.endpoint)
        self._sent = 0

    def send(self, events: Sequence[Event]) -> None:
        """Publish a batch."""
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._socket.send_multipart([b"kv@pod@model", self._sent.to_bytes(8, "big"), payload])
        self._sent += 1

    def close(self) -> None:
        """End it."""
        self._socket.close(0)


@contextmanager
def publishing() -> Iterator[Publisher]:
    """Start a publisher. Its path must be short."""
    with tempfile.TemporaryDirectory() as directory:
        publisher = Publisher(Path(directory))
        try:
            yield publisher
        finally:
            publisher.close()
