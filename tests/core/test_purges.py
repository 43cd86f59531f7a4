"""Purges of a remote tier whose store answers when the test says so."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from vllm_cachescope.tiers.envelope import Envelopes
from vllm_cachescope.tiers.inquiries import Lookup
from vllm_cachescope.tiers.jobs import Finished, Outgoing
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.remote import RemoteTier
from vllm_cachescope.tiers.store import Store, Value, Written

LIMITS = Limits(5.0, 0.25, 5.0, 1 << 20, 1, 2, 0.05, 0.2)
ACME, ZETA = b"acme    session1", b"zeta    session1"
PATIENCE_S = 10


class Gate:
    """Where a thread of the tier stops until the test lets it through."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def close(self) -> None:
        self.reached.clear()
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)


class Held(Store):
    """A store in memory. All threads' stores share what it holds."""

    address = "here"

    def __init__(self, place: "Place") -> None:
        self._place = place

    def alive(self) -> bool:
        return True

    def connect(self, deadline: float) -> None:
        pass

    def greet(self, deadline: float) -> dict[str, Any]:
        return {"used_bytes": 0, "capacity_bytes": 0}

    def secret_digests(self, deadline: float) -> set[bytes] | None:
        return None

    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        return [key in self._place.held for key in keys]

    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | None]:
        yield from (None for _ in keys)

    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        self._place.writing.pass_through()
        self._place.held.update(value.key for value in values)
        return [Written.STORED] * len(values)

    def touch(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        pass

    def drop(self, keys: Sequence[bytes], deadline: float) -> int:
        return 0

    def purge(self, prefix: bytes, deadline: float) -> int:
        self._place.purging.pass_through()
        self._place.purged.append(prefix)
        gone = {key for key in self._place.held if key.startswith(prefix)}
        self._place.held -= gone
        return len(gone)

    def close(self) -> None:
        pass


class Place:
    """What all threads' stores share, and a tier in front of it."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.purged: list[bytes] = []
        self.writing, self.purging = Gate(), Gate()
        envelopes = Envelopes(b"a secret of the tests", "model")
        self.tier = RemoteTier(
            "t", lambda: Held(self), 16, envelopes, LIMITS, time.monotonic, lambda: 0.5
        )
        self.tier.start()
        self._finished: dict[int, Finished] = {}

    def store(self, job: int, owner: bytes) -> bytes:
        """Begin to store a block; return its key."""
        key = owner + b"%036d" % job
        until = time.monotonic() + 300
        self.tier.store(job, [Outgoing(key, memoryview(bytes(16)), 300, until)])
        return key

    def ended(self, job: int) -> Finished:
        """Wait until a store is over."""
        self.wait(lambda: self._collected(job))
        return self._finished[job]

    def _collected(self, job: int) -> bool:
        self._finished |= {finished.job_id: finished for finished in self.tier.finished()}
        return job in self._finished

    @staticmethod
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.writing.open()
    place.purging.open()
    place.tier.close()


def test_others_store_while_one_purges_who_stores_nothing(place: Place) -> None:
    place.purging.close()
    purge = place.tier.purge(ACME[:8])
    assert place.purging.reached.wait(PATIENCE_S)
    theirs, mine = place.store(1, ZETA), place.store(2, ACME)
    assert place.ended(1).complete and not place.ended(2).complete
    assert place.held == {theirs}
    assert place.tier.lookup("r", mine) is Lookup.MISS
    assert not purge.over
    place.purging.open()
    place.wait(lambda: purge.over)
    again = place.store(3, ACME)
    assert place.ended(3).complete and place.held == {theirs, again}


def test_what_is_being_written_when_its_owner_is_purged_goes_too(place: Place) -> None:
    place.writing.close()
    place.store(1, ACME)
    assert place.writing.reached.wait(PATIENCE_S)
    purge = place.tier.purge(ACME)
    time.sleep(0.05)
    assert place.purged == [], "not before the write is over"
    place.writing.open()
    place.wait(lambda: purge.over)
    assert (purge.entries, place.held) == (1, set())


def test_equal_purges_that_wait_are_one(place: Place) -> None:
    place.purging.close()
    first = place.tier.purge(ACME)
    assert place.purging.reached.wait(PATIENCE_S)
    waiting = [place.tier.purge(prefix) for _ in range(50) for prefix in (ACME, ACME[:8])]
    assert len({id(purge) for purge in waiting}) == 2
    # The first one has begun: what came to the store after that is not known to be gone.
    assert first not in waiting
    place.purging.open()
    place.wait(lambda: all(purge.over for purge in waiting))
    assert place.purged == [ACME, ACME, ACME[:8]]
