"""What is known of blocks in a remote tier."""

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.tiers.block_states import ABSENCES, BlockState, BlockStates


def test_the_last_word_on_a_block_counts() -> None:
    known = BlockStates()
    known.note([b"a", b"b"], BlockState.HELD)
    known.note([b"b", b"c"], BlockState.DROPPED)
    known.missed([b"a", b"c", b"d"])
    assert [known.find(key) for key in (b"a", b"b", b"c", b"d")] == [
        BlockState.GONE,
        BlockState.DROPPED,
        BlockState.DROPPED,  # it never was there
        None,
    ]


def test_the_oldest_are_dropped_first() -> None:
    known = BlockStates(limit=2)
    for key in (b"a", b"b", b"a", b"c"):
        known.note([key], BlockState.HELD)
    assert known.find(b"b") is None and known.find(b"a") is known.find(b"c") is BlockState.HELD


def test_every_other_state_explains_something() -> None:
    assert set(ABSENCES) == set(BlockState) - {BlockState.HELD}
    assert {absence.cause for absence in ABSENCES.values()} == {
        MissCause.EVICTED,
        MissCause.NEVER_STORED,
        MissCause.TIMED_OUT,
        MissCause.TIER_UNAVAILABLE,
    }
