"""How often an account may purge, on a clock that the test drives."""

from tests.core.reach import reachable
from vllm_cachescope.api.purge_budget import BURST, MAX_ACCOUNTS, PER_SECOND, PurgeBudget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_at_a_steady_rate() -> None:
    clock = Clock()
    budget = PurgeBudget(clock)
    assert [budget.take("acme") for _ in range(BURST)] == [0.0] * BURST
    assert budget.take("acme") == 1 / PER_SECOND
    clock.now += 0.75 / PER_SECOND
    assert budget.take("acme") == 0.25 / PER_SECOND
    clock.now += 0.25 / PER_SECOND
    assert budget.take("acme") == 0.0
    assert budget.take("acme") > 0
    # Others are none the worse for it, and a rest fills no more than a bucket.
    assert budget.take("zeta") == 0.0
    clock.now += 100 * BURST / PER_SECOND
    assert sum(budget.take("acme") == 0.0 for _ in range(3 * BURST)) == BURST


def test_accounts_that_are_kept_are_bounded() -> None:
    budget = PurgeBudget(Clock())
    for i in range(MAX_ACCOUNTS + 100):
        budget.take(f"account {i}")
    kept = {x for x in reachable(budget) if isinstance(x, str) and x.startswith("account ")}
    assert len(kept) == MAX_ACCOUNTS
