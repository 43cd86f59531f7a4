"""How blocks left is remembered, up to a limit."""

from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionRecord
from vllm_cachescope.cache.ledger import Reason


def test_the_last_departure_counts_until_the_block_returns() -> None:
    departures = EvictionHistory()
    departures.record(b"a", EvictionRecord(Reason.TTL, 300, 10.0, "cpu"))
    departures.record(b"a", EvictionRecord(Reason.CAPACITY, 300, 20.0, "device"))
    assert departures.find(b"a") == EvictionRecord(Reason.CAPACITY, 300, 20.0, "device")
    departures.returned(b"a")
    departures.returned(b"a")
    assert departures.find(b"a") is None


def test_the_oldest_departures_are_forgotten_first() -> None:
    departures = EvictionHistory(limit=2)
    for at, key in enumerate((b"a", b"b", b"a", b"c")):
        assert departures.since is None
        departures.record(key, EvictionRecord(Reason.TTL, 300, float(at), "cpu"))
    assert len(departures) == 2
    assert departures.find(b"b") is None
    assert departures.find(b"a") == EvictionRecord(Reason.TTL, 300, 2.0, "cpu")
    # All that has happened since then is remembered.
    assert departures.since == 2.0
