"""What the engine's steps say of how long computing takes."""

import pytest

from vllm_cachescope.cache.prefill_rate import MIN_TOKENS, PrefillRate


def test_nothing_is_known_before_the_first_step_of_some_size():
    rate = PrefillRate()
    assert rate.seconds_for(1000) == 0.0
    rate.step_began(0.0, MIN_TOKENS - 1)
    rate.step_ended(1.0)
    assert rate.seconds_for(1000) == 0.0
    rate.step_ended(2.0)
    assert rate.seconds_for(1000) == 0.0


def test_steps_one_after_the_other():
    rate = PrefillRate()
    for start in range(5):
        rate.step_began(10.0 * start, 1000)
        rate.step_ended(10.0 * start + 2.0)
    assert rate.seconds_for(5000) == pytest.approx(10.0)


def test_a_step_that_is_scheduled_before_the_last_one_has_ended():
    """Its own time begins where the one before it ends."""
    rate = PrefillRate()
    rate.step_began(0.0, 1000)
    for number in range(1, 6):
        rate.step_began(2.0 * number - 1.9, 1000)
        rate.step_ended(2.0 * number)
    assert rate.seconds_for(5000) == pytest.approx(10.0)


def test_steps_without_tokens_take_nothing_away():
    rate = PrefillRate()
    rate.step_began(0.0, 1000)
    rate.step_began(0.1, 0)
    rate.step_ended(1.0)
    rate.step_ended(50.0)
    assert rate.seconds_for(1000) == pytest.approx(1.0)


def test_it_follows_an_engine_that_becomes_slower():
    rate = PrefillRate()
    for start, seconds in enumerate([1.0] * 3 + [4.0] * 20):
        rate.step_began(10.0 * start, 1000)
        rate.step_ended(10.0 * start + seconds)
    assert rate.seconds_for(1000) == pytest.approx(4.0, rel=0.01)


def test_short_steps_are_averaged_apart():
    rate = PrefillRate()
    assert rate.short_step_s == 0.0
    for number, tokens in enumerate((10, 0, 20, 5000, 1)):
        rate.step_began(10.0 * number, tokens)
        rate.step_ended(10.0 * number + (0.05 if 0 < tokens < MIN_TOKENS else 1.0))
    assert rate.short_step_s == pytest.approx(0.05)
    assert rate.tokens_per_s == pytest.approx(5000)
