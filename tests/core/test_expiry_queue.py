"""Keys in the order in which they expire."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.cache.expiry_queue import ExpiryQueue


def queue_of(**times: int) -> ExpiryQueue[str, int]:
    queue = ExpiryQueue[str, int]()
    for key, at in times.items():
        queue.set(key, at)
    return queue


def test_the_first_to_expire_comes_first() -> None:
    queue = queue_of(c=3, a=1, b=2)
    assert (queue.first(), len(queue)) == (1, 3)
    assert [queue.pop() for _ in range(3)] == [("a", 1), ("b", 2), ("c", 3)]
    assert queue.first() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_time_may_move_to_later_and_to_sooner() -> None:
    queue = queue_of(a=1, b=2, c=3)
    queue.set("a", 4)
    queue.set("c", 0)
    assert [queue.time_of(key) for key in "abcd"] == [4, 2, 0, None]
    assert [queue.pop() for _ in range(3)] == [("c", 0), ("b", 2), ("a", 4)]


def test_a_dropped_key_does_not_expire() -> None:
    queue = queue_of(a=1, b=2)
    queue.drop("a")
    queue.drop("never there")
    assert "a" not in queue and list(queue) == ["b"]
    assert (queue.first(), len(queue)) == (2, 1)
    queue.set("a", 3)
    assert [queue.pop() for _ in range(2)] == [("b", 2), ("a", 3)]


def test_expired_keys_are_taken_out_as_far_as_the_caller_asks() -> None:
    queue = queue_of(a=1, b=2, c=3, d=4)
    assert list(islice(queue.pop_expired(3), 2)) == [("a", 1), ("b", 2)]
    assert list(queue.pop_expired(3)) == [("c", 3)]
    assert list(queue) == ["d"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.integers(0, 20)),
        st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.just(0)),
        st.tuples(st.just("expire"), st.just(0), st.integers(0, 20)),
    ),
    max_size=120,
)


@given(STEPS)
def test_it_is_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    queue, times = ExpiryQueue[int, int](), dict[int, int]()
    for step, key, at in steps:
        order = sorted(times.items(), key=lambda item: (item[1], item[0]))
        if step == "set":
            queue.set(key, at)
            times[key] = at
        elif step == "drop":
            queue.drop(key)
            times.pop(key, None)
        elif step == "pop" and times:
            assert queue.pop() == order[0]
            del times[order[0][0]]
        elif step == "expire":
            expired = [item for item in order if item[1] <= at]
            assert list(queue.pop_expired(at)) == expired
            for gone, _ in expired:
                del times[gone]
        assert queue.first() == min(times.values(), default=None)
        assert {key: queue.time_of(key) for key in queue} == times
