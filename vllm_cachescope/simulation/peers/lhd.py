"""LHD: evicts, of some keys drawn at random, the one of the lowest hit density (Beckmann et al.,
NSDI 2018)."""

import random

from vllm_cachescope.simulation.peers.base import Peer

_AGES, _CLASSES, _DRAWN = 256, 16, 32
_DECAY = 0.9


class Lhd(Peer):
    """Least hit density. Ages are counted in accesses, classes by the age at the last hit.

    Args:
        capacity: how many keys it holds.
        rng: draws the keys that are compared.
    """

    def __init__(self, capacity: int, rng: random.Random | None = None) -> None:
        super().__init__(capacity)
        self._rng = rng or random.Random(0)
        self._keys: list[bytes] = []
        # Of each key: its index in `_keys`, when it was used last, and its class.
        self._known: dict[bytes, tuple[int, int, int]] = {}
        self._clock = 0
        self._coarseness = max(1, capacity // 32)
        self._hits = [[0.0] * _AGES for _ in range(_CLASSES)]
        self._evictions = [[0.0] * _AGES for _ in range(_CLASSES)]
        self._density = [[1.0 / (1 + age) for age in range(_AGES)] for _ in range(_CLASSES)]
        self._next_fit = capacity

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def access(self, key: bytes, now: float) -> None:
        self._clock += 1
        known = self._known.get(key)
        if known is not None:
            index, _, kind = known
            age = self._age(known)
            self._hits[kind][age] += 1
            self._known[key] = index, self._clock, min(_CLASSES - 1, age.bit_length() + 1)
        else:
            if len(self._keys) >= self.capacity:
                self._evict()
            self._known[key] = len(self._keys), self._clock, 0
            self._keys.append(key)
        if self._clock >= self._next_fit:
            self._next_fit = self._clock + 2 * self.capacity
            self._fit()

    def _age(self, known: tuple[int, int, int]) -> int:
        return min(_AGES - 1, (self._clock - known[1]) // self._coarseness)

    def _evict(self) -> None:
        victim, lowest = self._keys[0], float("inf")
        for _ in range(_DRAWN):
            key = self._keys[self._rng.randrange(len(self._keys))]
            known = self._known[key]
            density = self._density[known[2]][self._age(known)]
            if density < lowest:
                victim, lowest = key, density
        known = self._known.pop(victim)
        self._evictions[known[2]][self._age(known)] += 1
        last = self._keys.pop()
        if last != victim:
            self._keys[known[0]] = last
            self._known[last] = known[0], *self._known[last][1:]

    def _fit(self) -> None:
        for hits, evictions, density in zip(
            self._hits, self._evictions, self._density, strict=True
        ):
            hit = events = time = 0.0
            for age in range(_AGES - 1, -1, -1):
                hit += hits[age]
                events += hits[age] + evictions[age]
                time += events
                density[age] = hit / time if time > 0 else 0.0
                hits[age] *= _DECAY
                evictions[age] *= _DECAY
