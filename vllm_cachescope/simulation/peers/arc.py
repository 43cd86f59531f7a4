"""ARC: two LRU lists, of what was used once and more often, whose sizes follow the hits that each
lost (Megiddo and Modha, FAST 2003)."""

from collections import OrderedDict

from vllm_cachescope.simulation.peers.base import Peer

_Keys = OrderedDict[bytes, None]


class Arc(Peer):
    """Adaptive replacement, as its paper has it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._once: _Keys = OrderedDict()
        self._often: _Keys = OrderedDict()
        self._lost_once: _Keys = OrderedDict()
        self._lost_often: _Keys = OrderedDict()
        self._target = 0.0

    def __contains__(self, key: bytes) -> bool:
        return key in self._once or key in self._often

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def access(self, key: bytes, now: float) -> None:
        if key in self._once:
            del self._once[key]
            self._often[key] = None
        elif key in self._often:
            self._often.move_to_end(key)
        elif key in self._lost_once:
            grown = max(1.0, len(self._lost_often) / len(self._lost_once))
            self._target = min(self.capacity, self._target + grown)
            self._make_room(in_lost_often=False)
            del self._lost_once[key]
            self._often[key] = None
        elif key in self._lost_often:
            shrunk = max(1.0, len(self._lost_once) / len(self._lost_often))
            self._target = max(0.0, self._target - shrunk)
            self._make_room(in_lost_often=True)
            del self._lost_often[key]
            self._often[key] = None
        else:
            self._forget()
            self._once[key] = None

    def _forget(self) -> None:
        once = len(self._once) + len(self._lost_once)
        if once >= self.capacity:
            if self._lost_once:
                self._lost_once.popitem(last=False)
                self._make_room(in_lost_often=False)
            else:
                self._once.popitem(last=False)
        elif once + len(self._often) + len(self._lost_often) >= self.capacity:
            if once + len(self._often) + len(self._lost_often) >= 2 * self.capacity:
                self._lost_often.popitem(last=False)
            self._make_room(in_lost_often=False)

    def _make_room(self, in_lost_often: bool) -> None:
        if len(self) < self.capacity:
            return
        once = len(self._once)
        if once and (once > self._target or (in_lost_often and once == int(self._target))):
            self._lost_once[self._once.popitem(last=False)[0]] = None
        elif self._often:
            self._lost_often[self._often.popitem(last=False)[0]] = None
        else:
            self._lost_once[self._once.popitem(last=False)[0]] = None
