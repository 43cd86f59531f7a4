"""W-TinyLFU: a window of recent keys, and a main part that a key enters only if it was used more
often than the one it replaces (Einziger et al., ACM ToS 2017)."""

from collections import Counter, OrderedDict

from vllm_cachescope.simulation.peers.base import Peer

_WINDOW_SHARE, _PROTECTED_SHARE = 0.01, 0.8
_SAMPLE = 10


class WTinyLfu(Peer):
    """Window, probation and protected part; frequencies are counted exactly and halved each time
    that ten accesses for each place have been seen."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window_size = max(1, int(capacity * _WINDOW_SHARE))
        self._main_size = capacity - self._window_size
        self._protected_size = int(self._main_size * _PROTECTED_SHARE)
        self._window: OrderedDict[bytes, None] = OrderedDict()
        self._probation: OrderedDict[bytes, None] = OrderedDict()
        self._protected: OrderedDict[bytes, None] = OrderedDict()
        self._uses: Counter[bytes] = Counter()
        self._seen = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._window or key in self._probation or key in self._protected

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def access(self, key: bytes, now: float) -> None:
        self._count(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        elif key in self._probation:
            del self._probation[key]
            self._protected[key] = None
            if len(self._protected) > self._protected_size:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._window[key] = None
            if len(self._window) > self._window_size:
                self._admit(self._window.popitem(last=False)[0])

    def _admit(self, key: bytes) -> None:
        if len(self._probation) + len(self._protected) < self._main_size:
            self._probation[key] = None
            return
        part = self._probation or self._protected
        victim = next(iter(part), None)
        if victim is not None and self._uses[key] > self._uses[victim]:
            del part[victim]
            self._probation[key] = None

    def _count(self, key: bytes) -> None:
        self._uses[key] += 1
        self._seen += 1
        if self._seen >= _SAMPLE * self.capacity:
            self._seen = 0
            self._uses = Counter({one: n // 2 for one, n in self._uses.items() if n > 1})
