"""A reader by the rules of llm-d-router's precise prefix cache, as of August 2026 (ebab687).

From `pkg/kvevents` (pool, event_dedup_filter, engineadapter/vllm_adapter) and
`pkg/kvcache/kvblock` (extra_keys, token_processor, in_memory) of github.com/llm-d/llm-d-router.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import cbor2

from tests.routers.reader import Event, Reader

_PREFIX_KINDS = ("full_attention", "mla_attention", "sink_full_attention")


class LlmdReader(Reader):
    """Computes keys of its own from tokens and extra keys, chained by the engine's hashes.

    In the extra keys every string is the hash of a picture, a salt too; so is the first item of
    every list. Anything else is passed over. Stores are counted, and as many removals must come.
    """

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self._own_keys: dict[int, int] = {}
        # Whether there is a block, by its own key and medium.
        self._held: defaultdict[int, set[str]] = defaultdict(set)
        self._stores: Counter[tuple[str, int, int]] = Counter()
        self._kinds: dict[int, str] = {}

    def read(self, event: Event) -> None:
        {"BlockStored": self._store, "BlockRemoved": self._remove}.get(event["type"], self._clear)(
            event
        )

    def _store(self, event: Event) -> None:
        medium, group, hashes = event["medium"], event["group_idx"], event["block_hashes"]
        kind = event.get("kv_cache_spec_kind") or self._kinds.get(group, "")
        self._kinds.setdefault(group, kind)
        tokens, parent = event["token_ids"], event["parent_block_hash"]
        if kind not in _PREFIX_KINDS:
            return
        if not tokens:
            # Only a place is learned, of blocks that are known.
            known = [self._own_keys[h] for h in hashes if h in self._own_keys]
        else:
            if len(tokens) != event["block_size"] * len(hashes):
                return
            if parent and parent not in self._own_keys:
                return
            extras = [_pictures(keys) for keys in event.get("extra_keys") or [None] * len(hashes)]
            known = self._chain(self._own_keys[parent] if parent else _ROOT, tokens, extras)
            self._own_keys.update(zip(hashes, known, strict=True))
        for own in known:
            self._held[own].add(medium)
        self._stores.update((medium, group, h) for h in hashes if known)

    def _remove(self, event: Event) -> None:
        medium, group = event["medium"], event["group_idx"]
        if self._kinds.get(group) not in _PREFIX_KINDS:
            return
        for block_hash in event["block_hashes"]:
            stores = (medium, group, block_hash)
            self._stores[stores] -= 1
            if self._stores[stores] <= 0 and block_hash in self._own_keys:
                del self._stores[stores]
                held = self._held[self._own_keys[block_hash]]
                held.discard(medium)
                if not held:
                    del self._own_keys[block_hash]

    def _clear(self, event: Event) -> None:
        self._held.clear()
        self._stores.clear()

    def held(self, medium: str) -> set[int]:
        return {h for h, own in self._own_keys.items() if medium in self._held.get(own, ())}

    def matched(self, tokens: Sequence[int], salt: str = "") -> int:
        extras: list[list[str]] = [[] for _ in self.chunks(tokens)]
        if salt:
            extras[0].append(salt)
        matched = 0
        for own in self._chain(_ROOT, tokens, extras):
            if not self._held.get(own):
                break
            matched += 1
        return matched

    def _chain(self, own: int, tokens: Sequence[int], extras: Sequence[list[str]]) -> list[int]:
        keys = []
        for chunk, pictures in zip(self.chunks(tokens), extras, strict=True):
            own = _hash(own, chunk, [{"Hash": picture} for picture in pictures] or None)
            keys.append(own)
        return keys


def _pictures(keys: Sequence[Any] | None) -> list[str]:
    found = []
    for key in keys or ():
        first = key[0] if isinstance(key, list) and key else key
        if isinstance(first, str):
            found.append(first)
    return found


def _hash(parent: int, tokens: Sequence[int] | None, extra: Any) -> int:
    """Return the FNV-1a hash of the canonical CBOR."""
    state = 0xCBF29CE484222325
    for byte in cbor2.dumps([parent, tokens, extra], canonical=True):
        state = (state ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return state


_ROOT = _hash(0xCBF29CE484222325, None, "model")
