"""A reader by the rules of AIBrix's gateway, as of 059fe5e (the first that reads vLLM's maps).

From `pkg/cache/kvcache/msgpack_decoder.go`, `pkg/kvevent/handler.go` and
`pkg/utils/syncprefixcacheindexer/sync_hash.go` of github.com/vllm-project/aibrix.
"""

import hashlib
from collections.abc import Sequence

from tests.routers.reader import Event, Reader


class AibrixReader(Reader):
    """Keeps a table of prefixes by their tokens, and knows no scopes and, in effect, no media.

    A removal from any medium removes the block. A block's key is chained on the block in front of
    its event, so that with several blocks in one event only the first one is found again.
    """

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self._own_keys: dict[int, bytes] = {}
        self._prefixes: set[bytes] = set()

    def read(self, event: Event) -> None:
        if event["type"] == "AllBlocksCleared":
            self._prefixes.clear()
            return
        hashes = event["block_hashes"]
        if event["type"] == "BlockRemoved":
            for block_hash in hashes:
                self._prefixes.discard(self._own_keys.pop(block_hash, b""))
            return
        tokens, size = event["token_ids"], event["block_size"]
        chunks = [tokens[i : i + size] for i in range(0, len(tokens), size or 1)]
        if len(chunks) != len(hashes):
            return
        parent = self._own_keys.get(event["parent_block_hash"], b"")
        for block_hash, chunk in zip(hashes, chunks, strict=True):
            own = self._own_keys.setdefault(block_hash, _hash(parent, chunk))
            self._prefixes.add(own)

    def held(self, medium: str) -> set[int]:
        return {h for h, own in self._own_keys.items() if own in self._prefixes}

    def matched(self, tokens: Sequence[int], salt: str = "") -> int:
        own, matched = b"", 0
        for chunk in self.chunks(tokens):
            own = _hash(own, chunk)
            if own not in self._prefixes:
                break
            matched += 1
        return matched


def _hash(parent: bytes, chunk: list[int]) -> bytes:
    return hashlib.sha256(parent + repr(chunk).encode()).digest()
