"""The stream of KV events from one engine, with a reader of each kind at its end."""

import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.engine.engine import BLOCK
from tests.routers.aibrix import AibrixReader
from tests.routers.dynamo import DynamoReader
from tests.routers.llmd import LlmdReader
from tests.routers.reader import Event

_TRIES = 50


class EventStream:
    """Subscribes to an engine that is yet to start.

    Attributes:
        config: the engine's ``kv_events_config``.
        llmd, dynamo, aibrix: the readers, as far as `read` has come.
        told: how often each block was said to be stored, less how often to be removed, by
            medium and the engine's hash.
        twice: what was said twice in a row, in the same form.
        parents: the block before each that was said to be stored; None before a prompt's first.
            Engines that share a store may share it: what one has loaded, another has computed.
    """

    def __init__(self) -> None:
        # Its path must be short.
        self._directory = tempfile.TemporaryDirectory()
        endpoint = f"ipc://{Path(self._directory.name) / 'events'}"
        self.config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoint,
            "topic": "kv@pod@model",
        }
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self._socket.connect(endpoint)
        self.llmd, self.dynamo = LlmdReader(BLOCK), DynamoReader(BLOCK)
        self.aibrix = AibrixReader(BLOCK)
        self.told: Counter[tuple[str, int]] = Counter()
        self.twice: list[tuple[str, int]] = []
        self.parents: dict[int, int | None] = {}
        self._next = 0

    @property
    def readers(self) -> tuple[LlmdReader, DynamoReader, AibrixReader]:
        """All readers."""
        return self.llmd, self.dynamo, self.aibrix

    def await_first(self, provoke: Callable[[int], Any]) -> None:
        """Call ``provoke`` with one number after another until the engine's events arrive. What
        came before is lost: a subscriber may come too late for the first ones."""
        for number in range(_TRIES):
            if self._socket.poll(200):
                break
            provoke(number)
        assert self._socket.poll(0), "the engine tells nothing"
        self._next = int.from_bytes(self._socket.recv_multipart()[1], "big") + 1

    def forget(self) -> None:
        """Forget what was told so far. The engine is empty, and the readers know it."""
        self.told.clear()
        self.twice.clear()

    def read(self) -> list[Event]:
        """Read what has arrived; return the events."""
        events: list[Event] = []
        while self._socket.poll(0):
            _, number, payload = self._socket.recv_multipart()
            assert int.from_bytes(number, "big") == self._next, "a batch was lost"
            self._next += 1
            events += msgspec.msgpack.decode(payload)[1]
        for event in events:
            self._tell(event)
            for reader in self.readers:
                reader.read(event)
        return events

    def reached(self, there: set[int]) -> set[int]:
        """Return which blocks of ``there`` have all blocks in front of them there, too."""
        reached: set[int] = set()
        for start in there:
            path: list[int] = []
            block: int | None = start
            while block is not None and block in there and block not in reached:
                path.append(block)
                # What nobody ever said to be stored counts as a beginning, so that it is missed.
                block = self.parents.get(block)
            if block is None or block in reached:
                reached.update(path)
        return reached

    def _tell(self, event: Event) -> None:
        if event["type"] == "AllBlocksCleared":
            self.told.clear()
            return
        removed = event["type"] == "BlockRemoved"
        if not removed:
            # Without its tokens no router can use it.
            assert len(event["token_ids"]) == BLOCK * len(event["block_hashes"]), event
            chain = [event["parent_block_hash"], *event["block_hashes"]]
            self.parents |= {block: before for before, block in pairwise(chain)}
        for block_hash in event["block_hashes"]:
            if removed and block_hash not in self.parents:
                continue  # It was stored before the first event that arrived.
            told = event["medium"], block_hash
            if self.told[told] == (not removed):
                self.twice.append(told)
            self.told[told] = not removed

    def close(self) -> None:
        """Unsubscribe."""
        self._socket.close(0)
        self._directory.cleanup()
