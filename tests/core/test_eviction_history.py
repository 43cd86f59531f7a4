"""How blocks were evicted is remembered, up to a limit."""

from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionReason, EvictionRecord


def test_the_last_eviction_counts_until_the_block_returns() -> None:
    history = EvictionHistory()
    history.record(b"a", EvictionRecord(EvictionReason.TTL, 300, 10.0, "cpu"))
    history.record(b"a", EvictionRecord(EvictionReason.CAPACITY, 300, 20.0, "device"))
    assert history.find(b"a") == EvictionRecord(EvictionReason.CAPACITY, 300, 20.0, "device")
    history.drop(b"a")
    history.drop(b"a")
    assert history.find(b"a") is None


def test_the_oldest_evictions_are_dropped_first() -> None:
    history = EvictionHistory(limit=2)
    for at, key in enumerate((b"a", b"b", b"a", b"c")):
        assert history.since is None
        history.record(key, EvictionRecord(EvictionReason.TTL, 300, float(at), "cpu"))
    assert len(history) == 2
    assert history.find(b"b") is None
    assert history.find(b"a") == EvictionRecord(EvictionReason.TTL, 300, 2.0, "cpu")
    # All that has happened since then is remembered.
    assert history.since == 2.0
