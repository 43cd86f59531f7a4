"""Minutes of mixed traffic on two engines: what routers were told is what the engines hold."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest

from tests.engine.engine import BLOCK, OWNERS, Ask, draw_tokens, org_plan, sealed
from tests.frontends.places import DYNAMO, needs
from tests.redis.servers import wait_until
from tests.routers.fleet import GREEDY, Worker
from tests.routers.indexer import Indexer, running_indexer

pytestmark = [pytest.mark.engine, pytest.mark.slow, needs(DYNAMO)]

ROUNDS, LOOK_EVERY = 400, 10
SESSIONS = 24
LONGEST = 28
"""Blocks of a prompt, at most; the CPU tier holds three such prompts."""


@pytest.fixture(scope="module")
def indexer(running) -> Iterator[Indexer]:
    with running_indexer() as indexer:
        workers = (running.a, running.b)
        for number, worker in enumerate(workers, 1):
            indexer.register(worker.events.config["endpoint"], number)
        for number, worker in enumerate(workers, 1):
            # What is told before the indexer has connected is lost to it.
            for attempt in range(50):
                worker.run(Ask([500 + attempt] * 200, None))
                if any(indexer.held(number).values()):
                    break
        yield indexer


class Traffic:
    """Sessions that grow turn by turn, on whichever engine; and what is done to their caches."""

    def __init__(self, fleet, chance: random.Random) -> None:
        self.workers = (fleet.a, fleet.b)
        self.chance = chance
        self.done: Counter[str] = Counter()
        self._purges = 0
        self._sessions = [self._begun(number) for number in range(SESSIONS)]

    def _begun(self, number: int) -> tuple[int, list[int]]:
        return number, draw_tokens(self.chance, self.chance.randint(1, 6) * BLOCK + 7)

    def step(self) -> None:
        what = self.chance.choices(
            ("ask", "expire", "purge", "empty device"), weights=(85, 8, 5, 2)
        )[0]
        self.done[what] += 1
        {
            "ask": self._ask,
            "expire": self._expire,
            "purge": self._purge,
            "empty device": self._empty_device,
        }[what]()

    def _ask(self) -> None:
        """Some sessions take a turn at once, on an engine that is drawn."""
        asks = []
        for place in self.chance.sample(range(SESSIONS), self.chance.randint(1, 4)):
            number, tokens = self._sessions[place]
            if len(tokens) > LONGEST * BLOCK:
                self._sessions[place] = self._begun(number)
                number, tokens = self._sessions[place]
            tokens.extend(draw_tokens(self.chance, self.chance.randint(1, 3 * BLOCK)))
            if number % 2:
                # A front end's tenant, without a plan.
                asks.append(Ask(list(tokens), None, 1, f"dynamo-cache-salt:tenant{number % 6}"))
            else:
                org = GREEDY if number == 0 else f"tenant{number % 6}"
                ttl_s = 3600 if number % 4 else 300
                asks.append(Ask(list(tokens), sealed(org_plan(org, tokens, ttl_s)), 1))
        self.chance.choice(self.workers).run(*asks)

    def _expire(self) -> None:
        seconds = self.chance.choice((30, 150, 301))
        for worker in self.workers:
            worker.engine.call("advance", seconds)
            worker.engine.call("command_sweep")

    def _purge(self) -> None:
        tenant = f"tenant{self.chance.randrange(6)}"
        self._purges += 1
        for prefix in (OWNERS.prefix(tenant), *OWNERS.prefixes(f"salt:{tenant}")):
            name = f"purge {self._purges} {prefix.hex()}"
            for worker in self.workers:
                worker.engine.call("command_purge", prefix, name)
        for worker in self.workers:
            worker.engine.call("command_sweep")

    def _empty_device(self) -> None:
        self.chance.choice(self.workers).engine.call("empty_device")


MISSING = 2
"""Blocks of one medium that Dynamo's program (1.6.1) may lack, of tenants with
salts; see docs/fleet.md."""


def wrong(held: dict[str, set[int]], worker: Worker) -> dict[str, tuple[int, int]]:
    """Return, by medium, how many blocks an index lacks, and has too many.

    No prompt can use a block without those before it, and an index of prefixes finds none by it.
    What the engine holds of such blocks it may lack; what it still has of such it may keep.
    """
    usable = worker.usable()
    known = worker.events.reached(set().union(*held.values()))
    counts = {
        medium: (len(usable[medium] - held[medium]), len(held[medium] & known - resident))
        for medium, resident in worker.resident.items()
    }
    return {medium: (lost, kept) for medium, (lost, kept) in counts.items() if lost or kept}


def is_bad(counts: dict[str, tuple[int, int]]) -> bool:
    """Whether that is more than may be: nothing is kept that is gone, and few are missing."""
    return any(lost > MISSING or kept for lost, kept in counts.values())


def agree(indexer: Indexer, instance: int, worker: Worker) -> bool:
    """Whether Dynamo's program knows what an engine holds now: it may be told while it is asked."""
    return worker.agrees() and not wrong(indexer.held(instance), worker)


@pytest.mark.parametrize("seed", [5, 6])
def test_the_index_is_what_both_engines_hold(fleet, indexer, seed) -> None:
    """None lost, none twice: `settle` looks at each event, and at readers that keep to the rules
    of llm-d and Dynamo; the indexer is Dynamo's own program."""
    chance = random.Random(seed)
    traffic = Traffic(fleet, chance)
    most = Counter[str]()
    for number in range(1, ROUNDS + 1):
        traffic.step()
        if number % LOOK_EVERY:
            continue
        for instance, worker in enumerate(traffic.workers, 1):
            worker.settle()
            with suppress(TimeoutError):
                wait_until(partial(agree, indexer, instance, worker), 5)
            agree(indexer, instance, worker)
            found = wrong(indexer.held(instance), worker)
            assert not is_bad(found), (number, instance, traffic.done, found)
            for medium, held in worker.resident.items():
                most[medium] = max(most[medium], len(held))
    # It was traffic with everything in it, and more than either tier holds.
    assert set(traffic.done) == {"ask", "expire", "purge", "empty device"}
    assert min(most.values()) > 2 * LONGEST
