"""What is known of blocks in a remote tier."""

from vllm_cachescope.cache.miss_causes import EngineCause
from vllm_cachescope.tiers.block_states import ABSENCES, Fate, Whereabouts


def test_the_last_word_on_a_block_counts() -> None:
    known = Whereabouts()
    known.note([b"a", b"b"], Fate.HELD)
    known.note([b"b", b"c"], Fate.DROPPED)
    known.missed([b"a", b"c", b"d"])
    assert [known.find(key) for key in (b"a", b"b", b"c", b"d")] == [
        Fate.GONE,
        Fate.DROPPED,
        Fate.DROPPED,  # it never was there
        None,
    ]


def test_the_oldest_are_forgotten_first() -> None:
    known = Whereabouts(limit=2)
    for key in (b"a", b"b", b"a", b"c"):
        known.note([key], Fate.HELD)
    assert known.find(b"b") is None and known.find(b"a") is known.find(b"c") is Fate.HELD


def test_every_other_fate_explains_something() -> None:
    assert set(ABSENCES) == set(Fate) - {Fate.HELD}
    assert {absence.cause for absence in ABSENCES.values()} == {
        EngineCause.EVICTED,
        EngineCause.NEVER_STORED,
        EngineCause.TIMED_OUT,
        EngineCause.TIER_UNAVAILABLE,
    }
