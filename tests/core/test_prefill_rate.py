"""What the engine's steps say of how long computing takes."""

import pytest

from vllm_cachescope.cache.prefill_rate import LEAST_TOKENS, PrefillRate


def test_nothing_is_known_before_the_first_step_of_some_size():
    pace = PrefillRate()
    assert pace.seconds(1000) == 0.0
    pace.began(0.0, LEAST_TOKENS - 1)
    pace.ended(1.0)
    assert pace.seconds(1000) == 0.0
    pace.ended(2.0)
    assert pace.seconds(1000) == 0.0


def test_steps_one_after_the_other():
    pace = PrefillRate()
    for start in range(5):
        pace.began(10.0 * start, 1000)
        pace.ended(10.0 * start + 2.0)
    assert pace.seconds(5000) == pytest.approx(10.0)


def test_a_step_that_is_scheduled_before_the_last_one_has_ended():
    """Its own time begins where the one before it ends."""
    pace = PrefillRate()
    pace.began(0.0, 1000)
    for number in range(1, 6):
        pace.began(2.0 * number - 1.9, 1000)
        pace.ended(2.0 * number)
    assert pace.seconds(5000) == pytest.approx(10.0)


def test_steps_without_tokens_take_nothing_away():
    pace = PrefillRate()
    pace.began(0.0, 1000)
    pace.began(0.1, 0)
    pace.ended(1.0)
    pace.ended(50.0)
    assert pace.seconds(1000) == pytest.approx(1.0)


def test_it_follows_an_engine_that_becomes_slower():
    pace = PrefillRate()
    for start, seconds in enumerate([1.0] * 3 + [4.0] * 20):
        pace.began(10.0 * start, 1000)
        pace.ended(10.0 * start + seconds)
    assert pace.seconds(1000) == pytest.approx(4.0, rel=0.01)
