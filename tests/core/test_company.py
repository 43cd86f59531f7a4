"""Company: who waits for others that still load, and for how long; on a driven clock."""

import pytest

from vllm_cachescope.tiers.company import Company

STEP_S = 0.05


@pytest.fixture
def company() -> Company:
    company = Company()
    company.end_step(0)
    return company


def test_whoever_loads_alone_does_not_wait(company):
    assert company.may_go("a", 1.0, others_load=False, step_s=STEP_S)


def test_the_first_waits_for_the_others_and_no_longer_than_a_step_takes(company):
    for now, may in ((1.0, False), (1.049, False), (1.051, True)):
        assert company.may_go("a", now, others_load=True, step_s=STEP_S) is may
    # Each has its own time.
    assert not company.may_go("b", 1.051, others_load=True, step_s=STEP_S)
    assert company.may_go("b", 1.06, others_load=False, step_s=STEP_S)


def test_nobody_waits_while_something_is_computed(company):
    company.end_step(1)
    assert company.may_go("a", 1.0, others_load=True, step_s=STEP_S)


def test_nobody_waits_while_it_is_not_known_how_long_a_step_takes(company):
    assert company.may_go("a", 1.0, others_load=True, step_s=0.0)


def test_a_request_that_comes_again_has_its_time_anew(company):
    assert not company.may_go("a", 1.0, others_load=True, step_s=STEP_S)
    company.end("a")
    company.end("never there")
    assert not company.may_go("a", 2.0, others_load=True, step_s=STEP_S)
