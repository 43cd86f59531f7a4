"""What remote tiers share, without a store."""

import pytest

from vllm_cachescope.tiers.breaker import Breaker
from vllm_cachescope.tiers.keyspace import Keyspace, secret_digest


def test_names_differ_with_everything_that_makes_blocks_differ():
    identity = {"model": "m", "kv_dtype": "auto", "parallel": [1, 1]}
    same = Keyspace(dict(reversed(identity.items())))
    assert same.name(b"k") == Keyspace(identity).name(b"k")
    others = [Keyspace(identity | {field: "x"}) for field in identity]
    names = {k.name(b"k") for k in others} | {same.name(b"k"), same.name(b"l"), same.handshake}
    assert len(names) == 6


def test_the_digest_of_a_secret_does_not_tell_it():
    assert secret_digest(b"a") != secret_digest(b"b")
    assert b"open sesame" not in secret_digest(b"open sesame")


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker(time: Time, failures: int = 3) -> Breaker:
    # A random number of one half makes pauses exactly as long as they are on average.
    return Breaker(failures, 1.0, 5.0, time, lambda: 0.5)


def test_a_breaker_opens_after_failures_in_a_row():
    tested = breaker(Time())
    assert not tested.failed("a") and not tested.failed("a")
    tested.succeeded()
    assert not tested.failed("a") and not tested.failed("a") and tested.closed
    assert tested.failed("the reason")
    assert not tested.closed
    assert tested.reason == "the reason"


def test_an_open_breaker_is_probed_ever_more_rarely_and_closes_at_the_first_success():
    time = Time()
    tested = breaker(time, failures=1)
    tested.failed("x")
    pauses = []
    for _ in range(5):
        pauses.append(tested.probe_in())
        time.now += tested.probe_in()
        assert tested.probe_in() == 0
        assert not tested.failed("x")
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert tested.succeeded()
    assert tested.closed and tested.probe_in() == 0 and tested.reason is None
    tested.failed("y")
    assert tested.probe_in() == 1.0


def test_what_fails_late_does_not_put_off_the_probe():
    time = Time()
    tested = breaker(time, failures=1)
    tested.failed("x")
    time.now += 0.9
    for _ in range(5):
        tested.failed("under way when it opened")
    assert tested.probe_in() == pytest.approx(0.1)
