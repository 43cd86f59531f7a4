"""What routers are told of an engine's entries in a remote tier: each change once."""

from vllm_cachescope.tiers.inventory import Inventory


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_change_is_told_once() -> None:
    time = Time()
    inventory = Inventory(time)
    inventory.stored([(b"a", 300), (b"b", 300)])
    inventory.stored([(b"b", 200), (b"c", 200)])
    inventory.gone([b"a", b"x"])
    inventory.gone([b"a"])
    assert inventory.has_changes
    assert inventory.take_changes() == [([b"a", b"b"], False), ([b"c"], False), ([b"a"], True)]
    assert not inventory.has_changes
    assert inventory.take_changes() == []
    assert set(inventory.held()) == {b"b", b"c"}


def test_an_entry_is_gone_at_its_time_and_a_use_prolongs_it() -> None:
    time = Time()
    inventory = Inventory(time)
    inventory.stored([(b"a", 300), (b"b", 300), (b"c", 300)])
    inventory.take_changes()
    inventory.touch([(b"b", 500), (b"c", 100), (b"d", 500)])
    time.now = 299
    assert not inventory.has_changes
    time.now = 300
    assert inventory.has_changes
    assert inventory.take_changes() == [([b"a", b"c"], True)]
    inventory.stored([(b"a", 600)])
    time.now = 500
    assert inventory.take_changes() == [([b"a"], False), ([b"b"], True)]


def test_a_purge_ends_what_it_names() -> None:
    inventory = Inventory(Time())
    inventory.stored([(b"acme 1", 300), (b"zeta 1", 300), (b"acme 2", 300)])
    inventory.take_changes()
    inventory.purged(b"acme")
    inventory.purged(b"acme")
    assert inventory.take_changes() == [([b"acme 1", b"acme 2"], True)]
    inventory.purged(b"")
    assert inventory.take_changes() == [([b"zeta 1"], True)]


def test_a_purge_of_many_keeps_no_other_thread_waiting() -> None:
    inventory = Inventory(Time())
    free = []

    class Key(bytes):
        def startswith(self, *prefix: bytes) -> bool:  # type: ignore[override]
            free.append(not inventory._lock.locked())  # noqa: SLF001
            return super().startswith(*prefix)

    inventory.stored([(Key(b"acme %06d" % i), 300) for i in range(5_000)])
    inventory.take_changes()
    inventory.purged(b"acme")
    assert len(free) == 5_000 and all(free)
    dropped = inventory.take_changes()
    assert sum(len(change.keys) for change in dropped) == 5_000
    assert max(len(change.keys) for change in dropped) <= 1_000


def test_of_too_many_the_first_to_expire_are_told_to_be_gone() -> None:
    inventory = Inventory(Time(), limit=2)
    inventory.stored([(b"a", 300), (b"b", 100), (b"c", 200)])
    assert inventory.take_changes() == [([b"a", b"b", b"c"], False), ([b"b"], True)]
