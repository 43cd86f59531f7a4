import random
from itertools import product

import numpy as np
import pytest

from tests.core.report_reference import PlainCache
from vllm_cachescope.cli.report.best_marking import MarkingSearch
from vllm_cachescope.cli.report.cost_replay import CostReplay
from vllm_cachescope.cli.report.marking import MAX_MARKS, Marking, all_markings
from vllm_cachescope.cli.report.prompt_view import LOOKBACK, PLACES, Place, PromptView
from vllm_cachescope.usage.prices import Multipliers

MARKINGS = all_markings()


def view(blocks: list[tuple[str, int]], places: dict[Place, int], back: int | None) -> PromptView:
    """Return the view of a prompt of blocks, each with a name and its tokens."""
    keys, ends, key, end = [], [], 0, 0
    for name, tokens in blocks:
        key, end = hash((key, name)), end + tokens
        keys.append(key)
        ends.append(end)
    return PromptView(keys, ends, places, (), False, back)


def traffic(seed: int, calls: int = 40) -> list[tuple[float, int, PromptView]]:
    """Return calls of two agents that share their tools: ``(time, agent, prompt)``."""
    rng = random.Random(seed)
    found: list[tuple[float, int, PromptView]] = []
    at = 1.7e9
    talks: dict[int, list[tuple[str, int]]] = {}
    for n in range(calls):
        agent = rng.randrange(2)
        talk = talks.setdefault(agent, []) if rng.random() < 0.9 else []
        turn = len(talk)
        talk += [(f"{n}.{i}", rng.randint(20, 900)) for i in range(rng.choice([1, 2, 3, 25]))]
        head = [("tools", 1500), (f"system {agent}", 700)]
        places = {Place.TOOLS: 0, Place.SYSTEM: 1, Place.END: len(head) + len(talk) - 1}
        if turn:
            places |= {Place.OPENING: 2, Place.TURN: len(head) + turn - 1}
        at += rng.choice([1, 20, 200, 299, 301, 900, 3599, 3700])
        found.append((at, agent, view([*head, *talk], places, LOOKBACK)))
    return found


def ttls(marking: Marking, prompt: PromptView) -> dict[int, int]:
    found: dict[int, int] = {}
    for place, ttl_s in marking.marks:
        if place in prompt.places:
            block = prompt.places[place]
            found[block] = max(ttl_s, found.get(block, 0))
    return found


def test_all_markings_keep_the_rules() -> None:
    assert len(set(MARKINGS)) == len(MARKINGS) == 106
    assert MARKINGS[0] == Marking(()) and str(MARKINGS[0]) == "no breakpoints"
    for marking in MARKINGS:
        places, lifetimes = [place for place, _ in marking.marks], [ttl for _, ttl in marking.marks]
        assert len(places) <= MAX_MARKS
        assert places == sorted(places, key=PLACES.index)
        assert lifetimes == sorted(lifetimes, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_all_ways_side_by_side_are_as_each_by_itself(seed: int) -> None:
    replay, plain = CostReplay(len(MARKINGS), 1024), [PlainCache(1024) for _ in MARKINGS]
    read = 0
    for at, _, prompt in traffic(seed):
        marks = []
        for place in PLACES:
            if place in prompt.places:
                row = [dict(marking.marks).get(place, 0) for marking in MARKINGS]
                marks.append((prompt.places[place], np.array(row, np.float32)))
        found = replay.use(at, prompt, marks)
        for way, marking in enumerate(MARKINGS):
            expected = plain[way].use(at, prompt, ttls(marking, prompt))
            one = found.read, found.short, found.long, found.uncached
            assert tuple(int(values[way]) for values in one) == expected, (marking, at)
            assert sum(expected) == prompt.tokens
            read += expected[0]
    assert read > 100_000


def search(calls: list[tuple[float, int, PromptView]]) -> MarkingSearch:
    found = MarkingSearch({}, {}, 1024)
    for at, agent, prompt in calls:
        found.add(at, agent, prompt)
    return found


def cost_of(calls: list[tuple[float, int, PromptView]], mix: dict[int, Marking]) -> float:
    cache, total = PlainCache(1024), 0.0
    for at, agent, prompt in calls:
        read, short, long, rest = cache.use(at, prompt, ttls(mix[agent], prompt))
        total += rest + 0.1 * read + 1.25 * short + 2 * long
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_best_mix_costs_what_it_says_and_no_other_is_cheaper(seed: int) -> None:
    calls = traffic(seed, 24)
    best = search(calls).best()
    told = sum(spent.equivalents(Multipliers()) for spent in best.spent.values())
    uniform = sum(spent.equivalents(Multipliers()) for spent in best.uniform_spent.values())
    assert told == pytest.approx(cost_of(calls, dict(best.markings)))
    assert uniform == pytest.approx(cost_of(calls, dict.fromkeys(best.markings, best.uniform)))
    # Every mix of two agents, all at once.
    mixes = list(product(range(len(MARKINGS)), repeat=2))
    replay = CostReplay(len(mixes), 1024, entries=256)
    table = np.array(
        [[dict(marking.marks).get(place, 0) for marking in MARKINGS] for place in PLACES],
        np.float32,
    )
    ways = [table[:, [mix[agent] for mix in mixes]] for agent in (0, 1)]
    total = np.zeros(len(mixes))
    for at, agent, prompt in calls:
        marks = [
            (prompt.places[place], ways[agent][i])
            for i, place in enumerate(PLACES)
            if place in prompt.places
        ]
        tokens = replay.use(at, prompt, marks)
        total += tokens.uncached + 0.1 * tokens.read + 1.25 * tokens.short + 2 * tokens.long
    assert told <= total.min() * 1.001
    assert told <= uniform


def test_what_pays_depends_on_pauses_and_on_who_comes_back() -> None:
    # An agent that pauses for ten minutes, and one-shot calls on a model of their own.
    calls = []
    for n in range(8):
        main = [("tools", 4000), ("system", 2000), *((f"turn {i}", 100) for i in range(n + 1))]
        places = {Place.TOOLS: 0, Place.SYSTEM: 1, Place.END: n + 2}
        calls.append((600.0 * n, 0, view(main, places, LOOKBACK)))
        title = view([(f"title {n}", 3000)], {Place.END: 0}, LOOKBACK)
        calls.append((600.0 * n + 1, 1, title))
    best = search(calls).best()
    assert str(best.markings[1]) == "no breakpoints"
    assert best.markings[0].marks and all(ttl == 3600 for _, ttl in best.markings[0].marks)
    assert best.spent[0].read > 7 * 6000
    assert best.spent[1].uncached == best.spent[1].tokens == 8 * 3000


def test_a_prefix_is_found_twenty_blocks_in_front_of_a_breakpoint_and_no_further() -> None:
    def read(new: int, back: int | None) -> int:
        replay = CostReplay(1, 0)
        five = np.array([300], np.float32)
        first = view([("a", 2000)], {}, back)
        replay.use(0.0, first, [(0, five)])
        later = view([("a", 2000), *((f"b{i}", 1) for i in range(new))], {}, back)
        return int(replay.use(1.0, later, [(new, five)]).read[0])

    assert (read(20, LOOKBACK), read(21, LOOKBACK), read(500, None)) == (2000, 0, 2000)


def test_forgotten_prefixes_are_the_least_recently_used() -> None:
    replay, five = CostReplay(1, 0, entries=2), np.array([300], np.float32)
    a, b, c = (view([(name, 10)], {}, None) for name in "abc")
    for at, prompt in enumerate([a, b, a, c]):
        replay.use(float(at), prompt, [(0, five)])
    assert [int(replay.use(5.0, one, [(0, five)]).read[0]) for one in (a, b)] == [10, 0]
