"""The best way to mark some traffic: for each agent breakpoints and lifetimes, by replay.

Every marking is replayed over all of the traffic, and of each agent's prompts the cheapest is
taken. Agents share prefixes, so that one's marking changes what another finds: the mix is replayed
as a whole, and changed one agent at a time as long as that makes it cheaper.
"""

import marshal
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from vllm_cachescope.cli.report.cost_replay import CostReplay, Floats, Tokens
from vllm_cachescope.cli.report.marking import Marking, all_markings
from vllm_cachescope.cli.report.prompt_view import PLACES, PromptView
from vllm_cachescope.usage.prices import Multipliers
from vllm_cachescope.usage.record import FIVE_MINUTES_S, ONE_HOUR_S

_ROUNDS = 6
_TRIED_AGENTS = 12  # whose marking is changed in a mix: those that cost most
_TRIED_MARKINGS = 4  # of each agent, its cheapest by themselves; more where there is time
_TRIED_PROMPTS = 4_000_000  # in a round, each under each changed mix: some seconds


@dataclass(frozen=True, slots=True)
class Spent:
    """What became of tokens, and what they cost.

    Attributes:
        read: tokens read.
        short: tokens written to live for five minutes.
        long: tokens written to live for an hour.
        uncached: all others.
    """

    read: int
    short: int
    long: int
    uncached: int

    @classmethod
    def of(cls, tokens: Tokens, way: int) -> "Spent":
        """Return what became of ``tokens`` under one way to mark prompts."""
        kinds = tokens.read, tokens.short, tokens.long, tokens.uncached
        return cls(*(round(float(one[way])) for one in kinds))

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.read + self.short + self.long + self.uncached

    @property
    def created_by_ttl(self) -> dict[int, int]:
        """Tokens written, by lifetime in seconds."""
        return {FIVE_MINUTES_S: self.short, ONE_HOUR_S: self.long}

    def equivalents(self, multipliers: Multipliers) -> float:
        """Return what they cost, as a number of tokens that are not cached."""
        return multipliers.equivalents(self.uncached, self.read, self.created_by_ttl)


@dataclass(frozen=True, slots=True)
class BestMarking:
    """The cheapest mix of markings that was found.

    Attributes:
        markings: the marking of each agent, by its number.
        spent: what becomes of each agent's tokens under the mix.
        uniform: the cheapest marking that is the same for all agents.
        uniform_spent: what becomes of each agent's tokens under it.
    """

    markings: Mapping[int, Marking]
    spent: Mapping[int, Spent]
    uniform: Marking
    uniform_spent: Mapping[int, Spent]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as it is replayed again: what `CostReplay.use` needs of it."""

    at: float
    agent: int
    view: PromptView


class MarkingSearch:
    """Finds the best way to mark some traffic. Prompts are kept in a temporary file.

    Args:
        multipliers: what tokens cost, by the number of their agent; what is not in it has the
            default multipliers.
        weights: the price of an agent's tokens, by its number; 1 where it is not in it.
        min_tokens: tokens of the shortest prefix that is cached.
    """

    def __init__(
        self,
        multipliers: Mapping[int, Multipliers],
        weights: Mapping[int, float],
        min_tokens: int,
    ) -> None:
        self._multipliers = multipliers
        self._weights = weights
        self._min_tokens = min_tokens
        self._markings = (*all_markings(), Marking((), as_recorded=True))
        self._all = _Table.of(self._markings)
        self._replay = CostReplay(len(self._markings), min_tokens)
        self._spent: dict[int, Tokens] = {}
        self._calls = 0
        self._file = TemporaryFile("w+b")  # noqa: SIM115 - as long as the search lives

    def add(self, at: float, agent: int, view: PromptView) -> None:
        """Add the next prompt.

        Args:
            at: when it was sent, in seconds; not before the last one.
            agent: the number of its agent.
            view: the prompt.
        """
        self._calls += 1
        tokens = self._replay.use(at, view, self._all.marks(view))
        self._spent.setdefault(agent, Tokens.none(len(self._markings))).add(tokens)
        places = [view.places.get(place, -1) for place in PLACES]
        keys = array("q", view.keys).tobytes()
        ends = array("q", view.ends).tobytes()
        marks = view.marks, view.marked, view.lookback
        marshal.dump((at, agent, places, keys, ends, *marks), self._file)

    def best(self) -> BestMarking:
        """Return the best mix that is found."""
        costs = {agent: self._costs(agent, tokens) for agent, tokens in self._spent.items()}
        together = sum(costs.values(), np.zeros(len(self._markings)))
        first = int(np.argmin(_rounded(together)))
        uniform = dict.fromkeys(costs, first)
        mix = {agent: int(np.argmin(_rounded(own))) for agent, own in costs.items()}
        mix, spent = self._improved([mix, uniform], costs)
        return BestMarking(
            {agent: self._markings[way] for agent, way in mix.items()},
            spent,
            self._markings[first],
            {agent: Spent.of(tokens, first) for agent, tokens in self._spent.items()},
        )

    def _improved(
        self, mixes: list[dict[int, int]], costs: Mapping[int, NDArray[np.float64]]
    ) -> tuple[dict[int, int], dict[int, Spent]]:
        """Return the cheapest of ``mixes`` after changes, and what is spent under it."""
        agents = sorted(costs, key=lambda agent: -costs[agent].min())[:_TRIED_AGENTS]
        tried = max(_TRIED_MARKINGS, _TRIED_PROMPTS // max(1, self._calls * len(agents)))
        nearby = {agent: np.argsort(_rounded(costs[agent]))[:tried] for agent in agents}
        best, least, found = mixes[0], np.inf, dict[int, Spent]()
        for _ in range(_ROUNDS):
            spent = self._replayed(mixes)
            total = sum(
                (self._costs(agent, tokens) for agent, tokens in spent.items()),
                np.zeros(len(mixes)),
            )
            cheapest = int(np.argmin(_rounded(total)))
            if total[cheapest] >= least:
                break
            best, least = mixes[cheapest], float(total[cheapest])
            found = {agent: Spent.of(tokens, cheapest) for agent, tokens in spent.items()}
            mixes = [
                {**best, agent: int(way)}
                for agent in agents
                for way in nearby[agent]
                if way != best[agent]
            ]
            if len(costs) < 2 or not mixes:
                break
        return best, found

    def _replayed(self, mixes: Sequence[Mapping[int, int]]) -> dict[int, Tokens]:
        """Return what each agent's tokens become under each of ``mixes``."""
        replay = CostReplay(len(mixes), self._min_tokens)
        spent: dict[int, Tokens] = {}
        tables: dict[int, _Table] = {}
        for prompt in self._prompts():
            own = tables.get(prompt.agent)
            if own is None:
                ways = [self._markings[mix[prompt.agent]] for mix in mixes]
                own = tables[prompt.agent] = _Table.of(ways)
            tokens = replay.use(prompt.at, prompt.view, own.marks(prompt.view))
            spent.setdefault(prompt.agent, Tokens.none(len(mixes))).add(tokens)
        return spent

    def _prompts(self) -> Iterator[_Prompt]:
        self._file.seek(0)
        while True:
            try:
                at, agent, places, keys, ends, marks, marked, back = marshal.load(self._file)
            except EOFError:
                return
            found = {place: at for place, at in zip(PLACES, places, strict=True) if at >= 0}
            view = PromptView(_unpacked(keys), _unpacked(ends), found, marks, marked, back)
            yield _Prompt(at, agent, view)

    def _costs(self, agent: int, tokens: Tokens) -> NDArray[np.float64]:
        own = self._multipliers.get(agent, Multipliers())
        short, long = own.of_write(FIVE_MINUTES_S), own.of_write(ONE_HOUR_S)
        equivalents = (
            tokens.uncached + own.read * tokens.read + short * tokens.short + long * tokens.long
        )
        weighted: NDArray[np.float64] = self._weights.get(agent, 1.0) * equivalents
        return weighted


def _unpacked(data: bytes) -> "array[int]":
    numbers = array("q")
    numbers.frombytes(data)
    return numbers


@dataclass(frozen=True, slots=True)
class _Table:
    """Some markings as numbers.

    Attributes:
        ttls: for each of `PLACES` the TTL of each marking, 0 where it sets no breakpoint.
        as_recorded: 1 for each marking that is as recorded.
    """

    ttls: Floats
    as_recorded: Floats

    @classmethod
    def of(cls, markings: Sequence[Marking]) -> "_Table":
        rows = [dict(marking.marks) for marking in markings]
        return cls(
            np.array([[row.get(place, 0) for row in rows] for place in PLACES], np.float32),
            np.array([marking.as_recorded for marking in markings], np.float32),
        )

    def marks(self, view: PromptView) -> list[tuple[int, Floats]]:
        """Return the breakpoints in a prompt, as `CostReplay.use` takes them."""
        found = [
            (view.places[place], row)
            for place, row in zip(PLACES, self.ttls, strict=True)
            if place in view.places
        ]
        return found + [(block, ttl_s * self.as_recorded) for block, ttl_s in view.marks]


def _rounded(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return costs without the last digits, so that of equal ones the simplest marking is first."""
    rounded: NDArray[np.float64] = np.round(costs, 3)
    return rounded
