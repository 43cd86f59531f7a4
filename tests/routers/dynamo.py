"""A reader by the rules of Dynamo's KV router, version 1.6.1.

From `lib/kv-router/src/zmq_wire` (deserialize, extra_keys, convert) of
github.com/ai-dynamo/dynamo, and from feeding events to ``python -m dynamo.indexer`` 1.6.1: it
drops a whole batch whose extra keys have bytes that are no UTF-8.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tests.routers.reader import Event, Reader

_SALT = "dynamo-cache-salt:"


class DynamoReader(Reader):
    """Keeps a tree of blocks by their tokens, pictures and tenant, chained by the engine's hashes.

    A bare string of 64 hex digits is the hash of a picture, as is what stands before an offset; a
    string with Dynamo's own prefix names the tenant, for the blocks behind as well. What is not
    local to the worker is dropped, and so are blocks of another size.
    """

    def __init__(self, block: int) -> None:
        super().__init__(block)
        # The path of each block from the root, and its tenant, by the engine's hash.
        self._paths: dict[int, tuple[bytes, str]] = {}
        self._held: defaultdict[str, set[int]] = defaultdict(set)

    def read(self, event: Event) -> None:
        if event["type"] == "AllBlocksCleared":
            self._held.clear()
            return
        hashes = event["block_hashes"]
        for keys in event.get("extra_keys") or ():
            for key in keys or ():
                # As serde does for an untagged enum whose first kind is a string.
                if isinstance(key, bytes):
                    key.decode()
        if event.get("locality") not in (None, "LOCAL"):
            return
        if event["type"] == "BlockRemoved":
            self._held[event["medium"]].difference_update(hashes)
            return
        parent = event["parent_block_hash"]
        if event["block_size"] != self.block or (parent and parent not in self._paths):
            return
        path, tenant = self._paths[parent] if parent else (b"", "")
        extras = event.get("extra_keys") or [None] * len(hashes)
        tenant = _tenant(extras[0]) or tenant
        for block_hash, chunk, keys in zip(
            hashes, self.chunks(event["token_ids"]), extras, strict=True
        ):
            path = _extend(path, chunk, tenant, _pictures(keys))
            self._paths[block_hash] = path, tenant
        self._held[event["medium"]].update(hashes)

    def held(self, medium: str) -> set[int]:
        return set(self._held[medium])

    def matched(self, tokens: Sequence[int], salt: str = "") -> int:
        there = {self._paths[h][0] for held in self._held.values() for h in held}
        path, matched = b"", 0
        for chunk in self.chunks(tokens):
            path = _extend(path, chunk, salt.removeprefix(_SALT), [])
            if path not in there:
                break
            matched += 1
        return matched


def _tenant(keys: Sequence[Any] | None) -> str:
    texts = [key for key in keys or () if isinstance(key, str)]
    return next((text.removeprefix(_SALT) for text in texts if text.startswith(_SALT)), "")


def _pictures(keys: Sequence[Any] | None) -> list[str]:
    found = []
    for key in keys or ():
        if isinstance(key, list):
            found.append(key[0])
        elif isinstance(key, str) and len(key) == 64 and set(key) <= set("0123456789abcdef"):
            found.append(key)
    return found


def _extend(path: bytes, chunk: list[int], tenant: str, pictures: list[str]) -> bytes:
    return hashlib.sha256(repr((path, chunk, tenant, pictures)).encode()).digest()
