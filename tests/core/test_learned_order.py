"""The learned order: what it learns, and that quotas, claims and bounds hold whatever that was."""

import json
import math
import random
import tracemalloc
from collections import Counter
from threading import Thread

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.learned_kinds import kind_of
from tests.examples import examples
from vllm_cachescope.cache import gone_runs
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.return_counts import (
    BINS,
    EDGES,
    MAX_KINDS,
    Counted,
    ReturnCounts,
    bin_of,
)
from vllm_cachescope.cache.return_prices import fit_prices
from vllm_cachescope.cache.runs import Ended, Group, RequestSignals

ORGS = (b"", b"acme", b"zeta")
TTLS = (300, 3600)


def none(key: bytes) -> bool:
    return False


class Model:
    """Blocks by key, with whose they are and how long they live; prices are the order's own."""

    def __init__(self, reserves: dict[bytes, int], long_blocks: int) -> None:
        self.blocks: dict[bytes, tuple[bytes, bool]] = {}
        self.reserves, self.long_blocks = reserves, long_blocks

    def check(
        self, order: LearnedOrder, chosen: list[bytes] | None, count: int, spare: set[bytes]
    ) -> None:
        """Each one that was chosen must be of the class that goes first, and the cheapest of it."""
        may = {key for key in self.blocks if key not in spare}
        assert (chosen is None) == (len(may) < count)
        if chosen is None:
            return
        assert len(set(chosen)) == len(chosen) == count
        held = Counter(org for org, _ in self.blocks.values())
        long_held = sum(is_long for _, is_long in self.blocks.values())
        for key in chosen:
            first = [k for k in may if held[self.blocks[k][0]] > self.reserves[self.blocks[k][0]]]
            first = first or list(may)
            if long_held <= self.long_blocks:
                first = [k for k in first if not self.blocks[k][1]] or first
            assert key in first
            assert price(order, key) == min(price(order, k) for k in first)
            may.remove(key)
            org, is_long = self.blocks[key]
            held[org] -= 1
            long_held -= is_long


def price(order: LearnedOrder, key: bytes) -> tuple[float, float]:
    run = order.runs[key]
    return order.prices.of(run.cell), run.used_at


@settings(max_examples=examples(80), deadline=None)
@given(
    st.tuples(*[st.integers(0, 8) for _ in ORGS]),
    st.integers(0, 10),
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 29), st.integers(0, 2**20)),
        min_size=30,
        max_size=120,
    ),
)
def test_quotas_reserves_and_claims_hold_whatever_was_learned(
    reserves: tuple[int, ...], long_blocks: int, operations: list[tuple[int, int, int]]
) -> None:
    model = Model(dict(zip(ORGS, reserves, strict=True)), long_blocks)
    order = LearnedOrder(lambda org: model.reserves[org], long_blocks)
    now = 0.0
    for kind, number, drawn in operations:
        now += drawn % 7
        org, ttl_s = ORGS[number % 3], TTLS[drawn % 2]
        keys = [b"%d" % ((number + i) % 30) for i in range(drawn % 9 + 1)]
        spare = {b"%d" % key for key in range(30) if drawn >> (key % 20) & 3 == 0}
        if kind < 3:
            cut = drawn % len(keys)
            other = ORGS[(number + 1) % 3], TTLS[(drawn >> 3) % 2]
            pieces = [(keys[:cut], ttl_s, org), (keys[cut:], other[1], other[0])]
            order.use_request(pieces, now, RequestSignals(drawn % 500))
            model.blocks |= dict.fromkeys(keys[:cut], (org, ttl_s > 300))
            model.blocks |= dict.fromkeys(keys[cut:], (other[0], other[1] > 300))
        elif kind == 3:
            order.use(keys[0], ttl_s, now, org)
            model.blocks[keys[0]] = org, ttl_s > 300
        elif kind == 7:
            order.retire(keys)
            order.tell(keys[-1], Ended(drawn % 2))
        elif kind == 8:
            known = [key for key in keys if key in model.blocks]
            before = {key: price(order, key) for key in model.blocks}
            order.reassign(keys, org, ttl_s > 300)
            model.blocks |= dict.fromkeys(known, (org, ttl_s > 300))
            assert {key: price(order, key) for key in model.blocks} == before
        elif kind == 4:
            order.remove(keys[0])
            model.blocks.pop(keys[0], None)
        else:
            # Several times in a row: whatever one choice leaves behind must not mislead the next.
            for count, spared in ((number % 7 + 1, spare), (number % 5 + 1, set[bytes]())):
                found = order.victims(count, now, spared.__contains__)
                model.check(order, found, count, spared)
                if kind == 6 and found is not None:
                    for key in found:
                        order.remove(key)
                        del model.blocks[key]
        assert len(order) == len(model.blocks)
        assert order.long_held == sum(is_long for _, is_long in model.blocks.values())
        one = ORGS[drawn % 3]
        own = {key for key, (org, _) in model.blocks.items() if org == one}
        assert order.held(one) == len(own)
        mine = order.victims_of(one, number % 4 + 1, now, spare.__contains__)
        free = sorted(price(order, key) for key in own - spare)[: number % 4 + 1]
        assert [price(order, key) for key in mine] == free
        assert set(mine) <= own - spare


def chat(turns: int, returns: float, seed: int, capacity: int) -> tuple[float, float]:
    """Replay chats in which one kind of request never comes back and another does; return the
    share of returning blocks that were read, by the learned order and by LRU."""
    rng = random.Random(seed)
    order, lru = LearnedOrder(), dict[bytes, None]()
    events: list[tuple[float, int, int, bool]] = []
    for number in range(turns):
        at, comes_back = number * 1.0, rng.random() < returns
        events.append((at, number, 0, comes_back))
        if comes_back:
            events.append((at + rng.uniform(100, 140), number, 1, comes_back))
    read = read_lru = asked = 0
    for at, number, turn, comes_back in sorted(events):
        # Those that come back had a long answer.
        keys = [b"%d/%d" % (number, block) for block in range(8 + 4 * turn)]
        if turn and at > turns / 2:
            asked += 8
            read += sum(key in order.runs for key in keys[:8])
            read_lru += sum(key in lru for key in keys[:8])
        order.use_request([(keys, 300, b"")], at, RequestSignals(900 if comes_back else 20))
        for key in reversed(keys):
            lru.pop(key, None)
            lru[key] = None
        for key in order.victims(max(0, len(order) - capacity), at, none) or []:
            order.remove(key)
        while len(lru) > capacity:
            del lru[next(iter(lru))]
    return read / asked, read_lru / asked


def test_what_comes_back_is_kept_where_lru_loses_all_of_it() -> None:
    learned, lru = chat(2000, 0.3, seed=1, capacity=500)
    assert lru < 0.05
    assert learned > 0.9


def test_blocks_that_a_request_has_not_finished_with_count_as_no_return() -> None:
    order = LearnedOrder()
    for number in range(40):
        for block in range(5):
            order.use(b"%d/%d" % (number, block), 300, number * 1.0)
        keys = [b"%d/%d" % (number, block) for block in range(5)]
        order.use_request([(keys, 300, b"")], number * 1.0 + 0.5)
    assert not order.counted().returns.any()


def test_it_is_lru_until_it_has_seen_what_returns() -> None:
    order = LearnedOrder()
    rng = random.Random(3)
    for number in range(300):
        at = number * 0.3
        if number % 3:
            order.use(b"%d" % number, 300, at)
        else:
            keys = [b"%d" % number]
            order.use_request([(keys, 300, b"")], at, RequestSignals(rng.randrange(2000)))
    assert order.victims(300, 90.0, none) == [b"%d" % number for number in range(300)]


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    order = LearnedOrder()
    order.use_request([([b"a", b"b", b"c"], 300, b"")], 0.0)
    assert order.victims(2, 1.0, none) == [b"c", b"b"]
    assert order.victims(2, 1.0, {b"c"}.__contains__) == [b"b", b"a"]


def test_a_prompt_that_changes_hands_from_its_end_stays_one_run_and_ages_on() -> None:
    order = LearnedOrder()
    order.use_request([([b"%d" % block for block in range(6)], 300, b"a")], 0.0)
    order.use_request([([b"other"], 300, b"b")], 5.0)
    for block in (5, 4, 3):
        order.reassign([b"%d" % block], b"b", is_long=False)
    assert len({id(order.runs[b"%d" % block]) for block in (3, 4, 5)}) == 1
    assert order.held(b"a") == 3
    # Older than what was there, wherever it came from.
    assert order.victims_of(b"b", 4, 60.0, none) == [b"5", b"4", b"3", b"other"]
    # All of it returns, once.
    order.use_request([([b"%d" % block for block in range(6)], 300, b"a")], 70.0)
    assert order.counted().returns.sum() == 2.0


def test_what_is_marked_longer_stays_within_its_share_and_competes_beyond_it() -> None:
    order = LearnedOrder(long_blocks=2)
    for number in range(4):
        order.use_request([([b"long %d" % number], 3600, b"")], number * 10.0)
    for number in range(4):
        order.use_request([([b"short %d" % number], 300, b"")], 100.0 + number)
    chosen = order.victims(8, 200.0, none)
    # Two of the long ones are over the share, and older; then all others go before the last two.
    assert chosen is not None
    assert chosen[:2] == [b"long 0", b"long 1"]
    assert set(chosen[2:6]) == {b"short 0", b"short 1", b"short 2", b"short 3"}
    assert set(chosen[6:]) == {b"long 2", b"long 3"}


def test_what_was_learned_outlives_a_restart_and_a_damaged_file_does_not_matter() -> None:
    counts = ReturnCounts()
    number = counts.number((0, 1, 2, 3, -1))
    counts.add_return(number * BINS + 3, EDGES[3], 2.0)
    counts.add_stay(number * BINS + 3, number * BINS + 4, 10)
    state = json.loads(json.dumps(counts.counted().state()))
    order = LearnedOrder()
    assert order.restore(state)
    assert order.counted().kinds == ((0, 1, 2, 3, -1),)
    assert order.counted().returns[0, 3] > 1.9
    for damaged in (
        None,
        [],
        {},
        state | {"edges": [0, 1]},
        state | {"returns": state["returns"][1:]},
        state | {"exposure": [float("nan")] * BINS},
        state | {"exposure": [-1.0] * BINS},
        state | {"kinds": [["x"]]},
        state | {"kinds": [[]]},
        # Of a version that knew less of requests: kinds of several lengths could not be fitted.
        state | {"kinds": [[0, 1, 2, 3]]},
        state | {"kinds": [[7, 1]]},
    ):
        assert not LearnedOrder().restore(damaged)


def test_prices_follow_the_chance_of_a_return_and_the_wait_for_it() -> None:
    counts = ReturnCounts()
    soon, late, never = (counts.number((0, level)) for level in range(3))
    for number, age in ((soon, 2.0), (late, 600.0)):
        counts.add_return(number * BINS, age, 900.0)
        counts.add_stay(number * BINS, number * BINS + bin_of(age), 100)
    counts.add_stay(never * BINS, (never + 1) * BINS, 10_000)
    prices = fit_prices(counts.counted())
    assert prices.of(soon * BINS) > 5 * prices.of(late * BINS) > 5 * prices.of(never * BINS)
    # What was late all along gains as its time comes.
    assert prices.of(late * BINS + bin_of(400.0)) > 2 * prices.of(late * BINS)


def test_it_forgets_what_no_longer_holds() -> None:
    fitted: list[Counted] = []
    order = LearnedOrder(on_fit=fitted.append)
    for number in range(6_000):
        order.use_request([([b"%d" % number], 300, b"")], number * 1.0, RequestSignals(1))
        order.remove(b"%d" % number)
        if number == 100:
            order.use_request([([b"0"], 300, b"")], 100.0, RequestSignals(1))
            order.remove(b"0")
    assert max(counted.returns.sum() for counted in fitted) > 0.9
    assert order.counted().returns.sum() < 0.8


def test_memory_is_bounded_whatever_clients_send(monkeypatch) -> None:
    monkeypatch.setattr(gone_runs, "MAX_GONE_RUNS", 100)
    order, held = LearnedOrder(), []
    tracemalloc.start()
    for number in range(2000):
        org, keys = b"org %d" % number, [b"%d" % number, b"x%d" % number]
        order.use_request([(keys, 300, org)], number * 0.1, RequestSignals(number % 3))
        for key in keys:
            order.remove(key)
        if number in (700, 1999):
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(order) == 0
    assert not order.accounts
    assert held[1] < held[0] + 30_000
    counts = ReturnCounts()
    for number in range(3 * MAX_KINDS):
        counts.number((number % 3, number))
    assert len(counts.counted().kinds) <= MAX_KINDS + 3


def test_a_resident_block_costs_less_than_200_bytes() -> None:
    keys = [[b"%8d/%7d" % (number, block) for block in range(20)] for number in range(1500)]
    order = LearnedOrder()
    tracemalloc.start()
    for number, prompt in enumerate(keys):
        order.use_request([(prompt, 300, b"")], number * 1.0, RequestSignals(number % 1000))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # The keys themselves are vLLM's.
    assert held / len(order) < 200


def test_what_waits_for_a_tool_is_learned_apart_from_what_was_answered() -> None:
    order, at = LearnedOrder(), 0.0
    for number in range(400):
        keys = [b"%d/%d" % (number, block) for block in range(4)]
        order.use_request([(keys, 300, b"")], at, RequestSignals(100))
        waits = number % 2 == 0
        # It is told a moment later than the request was over.
        order.tell(keys[-1], Ended.TOOLS if waits else Ended.ANSWER)
        if waits:
            keys = [*keys, b"%d/4" % number]
            order.use_request([(keys, 300, b"")], at + 3.0, RequestSignals(100))
            order.tell(keys[-1], Ended.ANSWER)
        at += 5.0
    for name in (b"waits", b"answered"):
        keys = [name + b"%d" % block for block in range(4)]
        order.use_request([(keys, 300, b"")], at, RequestSignals(100))
    order.tell(b"waits3", Ended.TOOLS)
    order.tell(b"answered3", Ended.ANSWER)
    assert price(order, b"waits0")[0] > 3 * price(order, b"answered0")[0]
    # News of what was used since, or is not there, changes nothing.
    before = price(order, b"waits3")
    order.tell(b"waits1", Ended.ANSWER)
    order.tell(b"nobody", Ended.ANSWER)
    assert price(order, b"waits3") == before


def test_what_is_over_goes_first_unless_it_is_used_again() -> None:
    order = LearnedOrder()
    for number in range(4):
        keys = [b"%d/%d" % (number, block) for block in range(3)]
        order.use_request([(keys, 300, b"%d" % number)], number * 10.0)
    assert order.retire([b"3/1", b"3/0", b"3/2", b"nobody"]) == 3
    assert order.victims(4, 50.0, none) == [b"3/2", b"3/1", b"3/0", b"0/2"]
    assert order.victims(4, 90_000.0, none) == [b"3/2", b"3/1", b"3/0", b"0/2"]
    counted = order.counted().returns.sum()
    order.use_request([([b"3/0", b"3/1", b"3/2"], 300, b"3")], 90_010.0)
    assert order.counted().returns.sum() == counted
    assert order.victims(1, 90_011.0, none) == [b"0/2"]
    assert order.retire([b"0/1"]) == 1
    assert order.victims(3, 90_011.0, none) == [b"0/1", b"0/2", b"0/0"]
    order.remove_all([b"0/1"])
    assert len(order) == 11 and order.held(b"0") == 2


def test_no_rounding_of_ages_keeps_a_cell_due_for_ever() -> None:
    rng, unlucky = random.Random(0), 0
    for _ in range(200):
        used_at, edge = rng.uniform(0, 1e3), rng.choice(EDGES[3:20])
        now = used_at + edge
        if now - edge >= used_at:
            continue
        unlucky += 1
        order = LearnedOrder()
        order.use_request([([b"a"], 300, b"")], used_at)
        asked = Thread(target=order.victims, args=(1, now, none), daemon=True)
        asked.start()
        asked.join(10)
        assert not asked.is_alive(), (used_at, edge)
    assert unlucky > 10


def test_a_clock_that_stands_still_makes_no_price_that_is_no_number() -> None:
    order = LearnedOrder()
    for turn in range(40):
        for number in range(3):
            keys = [b"%d/%d" % (number, block) for block in range(turn % 7 + 1)]
            order.use_request([(keys, 300, b"")], 5.0, RequestSignals(8 * number))
    # Not for a moment either: numpy would say so on a server's console.
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        prices = fit_prices(order.counted())
    assert all(math.isfinite(price) for price in (*prices.cells, *prices.other))


def agents_prompts(seed: int) -> list[tuple[float, list[bytes]]]:
    """Return what agents ask that share their tools: when, and the blocks."""
    rng = random.Random(seed)
    heads = [[b"tools %d/%d" % (h, i) for i in range(rng.randrange(2, 12))] for h in range(3)]
    asked: dict[int, list[bytes]] = {}
    found, at = [], 10.0
    for number in range(60):
        agent = rng.randrange(10)
        before = asked.get(agent, [])
        if not before or rng.random() < 0.1:
            before = rng.choice(heads)
        new = [b"%d/%d" % (number, block) for block in range(rng.randrange(1, 6))]
        asked[agent] = [*before, *new]
        at += rng.choice([1.3, 3.7, 20.3, 60.1])
        found.append((at, asked[agent]))
    return found


def test_what_requests_use_before_they_are_over_is_learned_as_if_they_were_at_once() -> None:
    for seed in range(20):
        once, touched = LearnedOrder(), LearnedOrder()
        for at, keys in agents_prompts(seed):
            # As an engine does while it looks up, loads and computes.
            for key in keys:
                touched.use(key, 300, at)
            for order in (once, touched):
                order.use_request([(keys, 300, b"")], at)
            gone = once.victims(max(0, len(once) - 60), at, none) or []
            for order in (once, touched):
                order.remove_all(gone)
            assert {key: kind_of(once, key) for key in once.runs} == {
                key: kind_of(touched, key) for key in touched.runs
            }
        returns = [order.counted().returns.sum() for order in (once, touched)]
        assert returns[0] > 10
        assert math.isclose(returns[1], returns[0])


TOOLS = [b"tools/%d" % i for i in range(20)]
FIRST, OTHER = [b"first/%d" % i for i in range(4)], [b"other/%d" % i for i in range(6)]


def test_tools_are_known_as_shared_though_they_live_longer_than_what_follows() -> None:
    for ttl_s in (300, 3600):
        order, at = LearnedOrder(), 0.0
        for own in (FIRST, OTHER, [*FIRST, b"first/4"]):
            at += 10.0
            order.use_request([(TOOLS, ttl_s, b""), (own, 300, b"")], at)
        assert {kind_of(order, key)[0] for key in TOOLS} == {Group.SHARED}
        assert {kind_of(order, key)[0] for key in FIRST} == {Group.CONVERSATION}


def test_a_prompt_is_known_as_shared_though_its_end_is_in_another_tier() -> None:
    order = LearnedOrder()
    order.use_request([([*TOOLS, *FIRST], 300, b"device")], 10.0)
    order.reassign(FIRST, b"memory", is_long=False)
    order.use_request([([*TOOLS, *OTHER], 300, b"device")], 20.0)
    order.reassign(OTHER, b"memory", is_long=False)
    order.use_request([(TOOLS, 300, b"device"), (FIRST, 300, b"memory")], 30.0)
    assert {kind_of(order, key)[0] for key in TOOLS} == {Group.SHARED}
    assert {kind_of(order, key)[0] for key in FIRST} == {Group.CONVERSATION}
