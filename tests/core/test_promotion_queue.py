"""PromotionQueue: who gets room, in which order, and how long others wait; on a driven clock."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.tiers.promotion_queue import PromotionQueue, Room, Verdict, WaitOutcome

ACME, OTHER = b"acme", b"other"
LIMIT_S = 5.0


@dataclass
class Tier:
    """Room for `capacity` slots, and requests that ask for some in each step."""

    capacity: int = 30
    share: float = 0.5
    limit_s: float = LIMIT_S
    now: float = 100.0
    slots: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    spent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.queue = PromotionQueue(self.limit_s, self.share)

    def join(
        self,
        request: str,
        account: bytes = ACME,
        slots: int = 20,
        worth_s: float = 0.0,
        resumes: bool = False,
    ) -> Verdict:
        self.slots[request] = slots
        self.queue.join(request, account, slots, worth_s, self.now, resumes)
        return self.ask(request)

    def ask(self, request: str) -> Verdict:
        if request in self.used:
            return Verdict.GO
        verdict = self.queue.ask(request, self.now, lambda: self.room(request))
        if verdict is Verdict.GO:
            self.used[request] = self.slots[request]
            self.order.append(request)
        return verdict

    def room(self, request: str) -> Room:
        if request in self.spent:
            return Room.SPENT
        free = self.capacity - sum(self.used.values())
        return Room.ENOUGH if self.slots[request] <= free else Room.LACKING

    def step(self, *requests: str, seconds: float = 0.01) -> list[Verdict]:
        self.queue.end_step()
        self.now += seconds
        return [self.ask(request) for request in requests]

    def settle(self, request: str) -> None:
        del self.used[request]
        self.queue.settle(request, self.now)

    def outcomes(self) -> dict[str, int]:
        waits = self.queue.take_waits().take()
        return {outcome: counts.total() for (outcome,), counts, _ in waits}


def test_whoever_finds_room_does_not_wait():
    tier = Tier(capacity=40)
    assert [tier.join("a"), tier.join("b"), tier.join("c")] == [
        Verdict.GO,
        Verdict.GO,
        Verdict.WAIT,
    ]
    assert tier.queue.waited_s("a") == 0.0
    assert tier.outcomes() == {"at_once": 2}
    assert (tier.queue.waiting, tier.queue.granted) == (1, 40)


def test_the_others_come_in_order_and_each_gets_all_or_nothing():
    tier = Tier()
    for name in "abc":
        tier.join(name)
    # Ten slots are free: none for half a prompt, and none for one that came later and is smaller.
    assert tier.join("small", slots=5) is Verdict.WAIT
    # vLLM may ask in another order.
    assert tier.step("small", "c", "b") == [Verdict.WAIT] * 3
    tier.settle("a")
    assert tier.step("small", "c", "b") == [Verdict.WAIT, Verdict.WAIT, Verdict.GO]
    assert tier.queue.waited_s("b") == pytest.approx(0.02)
    tier.settle("b")
    assert tier.step("small", "c") == [Verdict.WAIT, Verdict.GO]
    assert tier.step("small") == [Verdict.GO]
    assert tier.outcomes() == {"at_once": 1, "waited": 3}


def test_no_wait_is_longer_than_the_limit():
    tier = Tier()
    tier.join("a")
    tier.join("b")
    assert tier.step("b", seconds=LIMIT_S - 0.1) == [Verdict.WAIT]
    assert tier.step("b", seconds=0.1) == [Verdict.COMPUTE]
    assert "b" not in tier.queue and tier.queue.waiting == 0
    assert tier.outcomes() == {"at_once": 1, "late": 1}


def test_no_wait_is_longer_than_its_share_of_computing():
    tier = Tier(share=0.5)
    tier.join("a", worth_s=0.6)
    # Without waiting the engine would have both to compute.
    tier.join("b", worth_s=0.6)
    assert tier.queue.bound_s("b") == pytest.approx(0.6)
    tier.join("c", worth_s=0.6)
    assert tier.queue.bound_s("c") == pytest.approx(0.9)
    assert tier.step("b", "c", seconds=0.7) == [Verdict.COMPUTE, Verdict.WAIT]


def test_a_share_of_zero_waits_for_nothing():
    tier = Tier(share=0.0)
    assert tier.join("a") is Verdict.GO
    assert tier.join("b") is Verdict.COMPUTE
    assert tier.join("c", slots=5) is Verdict.GO


def test_whoever_could_not_be_served_in_time_computes_at_once():
    tier = Tier(limit_s=1.0)
    tier.join("a")
    tier.step(seconds=0.5)
    tier.settle("a")  # 20 slots in half a second
    verdicts = [tier.join(name) for name in "bcdef"]
    assert verdicts == [Verdict.GO, Verdict.WAIT, Verdict.WAIT, Verdict.COMPUTE, Verdict.COMPUTE]
    assert tier.outcomes() == {"at_once": 2, "turned_away": 2}


def test_those_who_wait_without_hope_leave_as_soon_as_that_is_known():
    """As in the first burst after a start, when nobody has seen yet how fast room comes free."""
    tier = Tier(limit_s=1.0)
    names = "abcdefgh"
    assert [tier.join(name) for name in names] == [Verdict.GO] + [Verdict.WAIT] * 7
    tier.step(*names[1:], seconds=0.3)
    tier.settle("a")
    assert tier.step(*names[1:]) == [Verdict.GO] + [Verdict.WAIT] * 2 + [Verdict.COMPUTE] * 4


def test_one_who_needs_little_is_not_turned_away_while_there_is_room():
    tier = Tier(limit_s=0.1)
    tier.join("a")
    tier.step(seconds=10)
    tier.settle("a")
    tier.join("b")
    assert tier.join("small", slots=10) is Verdict.GO


def test_accounts_take_turns():
    tier = Tier()
    tier.join("a0")
    for number in range(1, 6):
        tier.join(f"a{number}")
    tier.join("b0", OTHER)
    waiting = [f"a{number}" for number in range(1, 6)] + ["b0"]
    while tier.used:
        tier.settle(next(iter(tier.used)))
        tier.step(*[name for name in waiting if name not in tier.order])
        tier.step(*[name for name in waiting if name not in tier.order])
    assert tier.order == ["a0", "b0", "a1", "a2", "a3", "a4", "a5"]


def test_what_goes_on_comes_before_those_of_its_account_that_came_later():
    tier = Tier(capacity=10)
    assert tier.join("long", slots=6) is Verdict.GO
    tier.join("next", slots=8)
    tier.join("other", OTHER, slots=8)
    tier.settle("long")
    # Another account has its turn, as it has had none yet.
    assert tier.join("long", slots=6, resumes=True) is Verdict.WAIT
    assert tier.step("next", "other", "long") == [Verdict.WAIT, Verdict.GO, Verdict.WAIT]
    tier.settle("other")
    assert tier.step("next", "long") == [Verdict.WAIT, Verdict.GO]
    tier.settle("long")
    assert tier.step("next") == [Verdict.GO]
    assert tier.outcomes() == {"at_once": 1, "waited": 3}


def test_what_goes_on_waits_for_a_share_of_its_own_computing():
    tier = Tier(capacity=10)
    tier.join("first", slots=8)
    for late in ("b", "c"):
        tier.join(late, slots=8, worth_s=1.0)
    tier.join("long", slots=4, worth_s=1.0, resumes=True)
    # Of those that wait nobody is before it, of those that have room one of twice its size.
    assert tier.queue.bound_s("long") == pytest.approx(0.5 * 3)


def test_a_large_turn_counts_for_more():
    tier = Tier(capacity=20)
    tier.join("big0", slots=20)
    tier.join("big1", slots=20)
    for number in range(6):
        tier.join(f"small{number}", OTHER, slots=10)
    names = ["big1", *(f"small{number}" for number in range(6))]
    while tier.used:
        tier.settle(next(iter(tier.used)))
        for _ in range(3):
            tier.step(*[name for name in names if name not in tier.order])
    turns = [name[:3] for name in tier.order]
    # Two small ones for each big one while both wait.
    assert turns.index("big", 1) <= 3
    assert len(turns) == 8


def test_whoever_is_cut_off_holds_up_nobody():
    tier = Tier()
    tier.join("a")
    tier.join("b")
    tier.join("c")
    tier.queue.leave("b")
    tier.settle("a")
    assert tier.step("c") == [Verdict.GO]
    tier.queue.leave("c")
    assert tier.queue.granted == 0
    tier.queue.leave("never there")
    tier.queue.settle("never there", tier.now)
    assert tier.outcomes() == {"at_once": 1, "cut_off": 1, "waited": 1}


def test_one_that_does_not_ask_holds_up_nobody():
    """As a request whose grammar is still being compiled."""
    tier = Tier()
    for name in "abc":
        tier.join(name)
    tier.settle("a")
    assert tier.step("c") == [Verdict.WAIT]
    assert tier.step("c") == [Verdict.GO]
    tier.settle("c")
    assert tier.step("b") == [Verdict.GO]


def test_what_the_engine_does_not_come_round_to_ask_is_no_wait_for_room():
    """As while the device has no free block for the request in front of it."""
    tier = Tier(limit_s=1.0)
    tier.join("a")
    tier.join("b")
    assert tier.step("b", seconds=0.6) == [Verdict.WAIT]
    for _ in range(3):
        tier.step(seconds=10)
    assert tier.step("b", seconds=0.3) == [Verdict.WAIT]
    assert tier.queue.waited_s("b") == pytest.approx(0.6)
    assert tier.step("b", seconds=0.4) == [Verdict.COMPUTE]


def test_a_tier_that_dies_meanwhile_is_waited_for_no_longer():
    tier = Tier()
    tier.join("a")
    tier.join("b")
    tier.queue.leave("b", WaitOutcome.TIER_LOST)
    assert tier.outcomes() == {"at_once": 1, "tier_lost": 1}


def test_whose_account_has_spent_its_room_holds_up_no_other_account():
    tier = Tier(capacity=100)
    tier.join("a0")
    tier.spent = {"a1", "a2"}
    assert tier.join("a1") is Verdict.WAIT
    assert tier.join("a2") is Verdict.WAIT
    assert tier.join("b0", OTHER) is Verdict.GO
    assert tier.step("a1", "a2") == [Verdict.WAIT] * 2
    tier.spent = set()
    for _ in range(3):
        tier.step(*[name for name in ("a1", "a2") if name not in tier.used])
    assert tier.order == ["a0", "b0", "a1", "a2"]


def test_a_request_may_need_less_once_others_have_promoted_what_they_share():
    tier = Tier()
    tier.join("a")
    tier.join("b")
    tier.slots["b"] = 10
    tier.queue.resize("b", 10)
    assert tier.step("b") == [Verdict.GO]
    assert tier.queue.granted == 30


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([ACME, OTHER, b"third"]),
        st.integers(1, 30),
        st.sampled_from([0.0, 0.1, 3.0]),
        st.integers(0, 3),
        st.sampled_from(["settle", "abort"]),
    ),
    min_size=1,
    max_size=40,
)


@given(REQUESTS, st.floats(0.001, 0.4), st.integers(1, 6))
def test_whatever_comes_room_is_never_given_twice_and_everyone_leaves_in_time(
    requests, seconds, service_steps
):
    tier = Tier(limit_s=1.0)
    ends: dict[str, str] = {}
    came: dict[str, float] = {}
    served_at: dict[str, int] = {}
    by_account: dict[bytes, list[str]] = defaultdict(list)
    asking: list[str] = []
    arrivals = list(enumerate(requests))
    step = 0
    while arrivals or asking or tier.used:
        step += 1
        assert step < 10_000, "somebody waits for ever"
        tier.step(seconds=seconds)
        while arrivals and (arrivals[0][1][3] == 0 or step % 2):
            number, (account, slots, worth_s, _, end) = arrivals.pop(0)
            name = f"r{number}"
            ends[name], came[name] = end, tier.now
            by_account[account].append(name)
            verdict = tier.join(name, account, slots, worth_s)
            if verdict is Verdict.WAIT:
                asking.append(name)
            elif verdict is Verdict.GO:
                served_at[name] = step
            if arrivals and arrivals[0][1][3]:
                break
        for name in list(asking):
            waited_s = tier.now - came[name]
            if ends[name] == "abort" and waited_s > 0.5:
                tier.queue.leave(name)
                asking.remove(name)
                continue
            verdict = tier.ask(name)
            assert sum(tier.used.values()) <= tier.capacity
            if verdict is Verdict.WAIT:
                assert waited_s < 1.0
                continue
            asking.remove(name)
            if verdict is Verdict.GO:
                served_at[name] = step
        for name in list(tier.used):
            if step - served_at[name] >= service_steps:
                tier.settle(name)
    assert (tier.queue.waiting, tier.queue.granted) == (0, 0)
    assert not tier.queue._waiting and not tier.queue._turns  # noqa: SLF001 — nothing is left behind
    for names in by_account.values():
        served = [name for name in names if name in served_at]
        assert served == sorted(served, key=lambda name: tier.order.index(name))
    assert sum(tier.outcomes().values()) == len(requests)


@given(st.integers(2, 40), st.integers(5, 30))
def test_a_burst_delays_another_account_by_one_turn_of_each_size(burst, slots):
    tier = Tier(limit_s=1e9)
    names = [f"a{number}" for number in range(burst)]
    for name in names:
        tier.join(name, slots=slots)
    tier.join("b", OTHER, slots=slots)
    before = Counter[bytes]()
    for _ in range(2 * burst):
        waiting = [name for name in [*names, "b"] if name not in tier.order]
        if "b" in tier.order:
            break
        for name in list(tier.used):
            tier.settle(name)
        tier.step(*waiting)
        tier.step(*waiting)
    else:
        pytest.fail("the other account starves")
    before[ACME] = tier.order.index("b")
    # What had room when it came, and one turn.
    assert before[ACME] <= 30 // slots + 1
