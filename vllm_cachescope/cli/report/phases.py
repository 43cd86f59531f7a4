"""The phases of a session: stretches in which the same agents work and share as much.

A session's calls are cut where that makes them easiest to describe: each phase by the share of its
tokens that were shared, and by how its calls divide among agents. Every cut has a price, so that
there are few; it is lower where something shows that a phase ends: a compaction, another model, a
pause longer than a cache's lifetime.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_cachescope.usage.record import FIVE_MINUTES_S

_MAX_BINS = 512  # longer sessions are cut between bins of several calls
_MAX_AGENTS = 16
_SHARE_WEIGHT = 1.0  # nats of a difference in shares, against those of a difference in agents
_CUT = 1.2  # price of a cut, in multiples of log(calls)
_SHOWN_CUT = 0.3  # of one where something shows that a phase ends
_SHIFT = 0.005  # shares that differ by less are told as equal


@dataclass(frozen=True, slots=True)
class PhaseCall:
    """One call of a session, as far as phases depend on it.

    Attributes:
        tokens: tokens of its prompt.
        shared: how many of them an earlier call had, from the first on.
        agent: number of its agent.
        model: number of its model.
        at: when it was sent, in seconds.
        compacted: whether it goes on from a summary.
    """

    tokens: int
    shared: int
    agent: int = 0
    model: int = 0
    at: float = 0.0
    compacted: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a session.

    Attributes:
        first, last: its calls, numbered from 0 in the session.
        tokens: tokens of their prompts.
        shared: how many of them earlier calls had.
        agents: the numbers of the agents that made calls, the busiest first.
        began: what shows that it began, in a few words.
    """

    first: int
    last: int
    tokens: int
    shared: int
    agents: tuple[int, ...]
    began: str

    @property
    def share(self) -> float:
        """Share of its tokens that earlier calls had."""
        return self.shared / self.tokens if self.tokens else 0.0


def find_phases(calls: Sequence[PhaseCall]) -> list[Phase]:
    """Return the phases of a session, at least one if it has a call.

    Args:
        calls: the session's calls, in order.
    """
    if not calls:
        return []
    n = len(calls)
    width = -(-n // _MAX_BINS)
    starts = list(range(0, n, width))
    prices = _CUT * np.log(max(2, n)) * np.array([_price(calls, start) for start in starts])
    costs = _Costs(calls, [*starts, n])
    # best[j]: the cheapest description of the bins before j, and where its last phase begins.
    bins = len(starts)
    best, begins = np.zeros(bins + 1), np.zeros(bins + 1, int)
    for j in range(1, bins + 1):
        total = best[:j] + prices[:j] + costs.of(j)
        begins[j] = int(np.argmin(total))
        best[j] = total[begins[j]]
    cuts: list[int] = []
    j = bins
    while j > 0:
        j = int(begins[j])
        cuts.append(starts[j])
    cuts.reverse()
    phases: list[Phase] = []
    for first, end in zip(cuts, [*cuts[1:], n], strict=True):
        phases.append(_phase(calls, first, end, phases[-1] if phases else None))
    return phases


class _Costs:
    """What it takes to describe the calls from one bin to another, in nats."""

    def __init__(self, calls: Sequence[PhaseCall], edges: Sequence[int]) -> None:
        tokens = np.array([call.tokens for call in calls], float)
        share = np.array([call.shared / max(1, call.tokens) for call in calls], float)
        weight = _SHARE_WEIGHT * tokens / max(1.0, tokens.mean())
        agents = np.array([call.agent for call in calls])
        known, number = np.unique(agents, return_inverse=True)
        ranks = np.minimum(number, _MAX_AGENTS - 1)
        counts = np.zeros((len(calls), min(len(known), _MAX_AGENTS)))
        counts[np.arange(len(calls)), ranks] = 1
        self._weight = _cumulated(weight, edges)
        self._shared = _cumulated(weight * share, edges)
        self._own = _cumulated(weight * _entropy(share), edges)
        self._counts = _cumulated(counts, edges)

    def of(self, j: int) -> NDArray[np.float64]:
        """Return the cost of the bins from each one before ``j`` up to ``j``."""
        weight = np.maximum(self._weight[j] - self._weight[:j], 1e-9)
        share = (self._shared[j] - self._shared[:j]) / weight
        spread = weight * _entropy(share) - (self._own[j] - self._own[:j])
        counts = self._counts[j] - self._counts[:j]
        of_all = counts.sum(axis=1, keepdims=True)
        logs = np.log(np.where(counts > 0, counts / of_all, 1.0))
        cost: NDArray[np.float64] = spread - (counts * logs).sum(axis=1)
        return cost


def _cumulated(values: NDArray[np.float64], edges: Sequence[int]) -> NDArray[np.float64]:
    start = np.zeros((1, *values.shape[1:]))
    sums: NDArray[np.float64] = np.concatenate([start, np.cumsum(values, axis=0)])[list(edges)]
    return sums


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of coins that fall on their face with the chance ``share``, in nats."""
    p = np.clip(share, 1e-4, 1 - 1e-4)
    entropy: NDArray[np.float64] = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return entropy


def _price(calls: Sequence[PhaseCall], start: int) -> float:
    return 0.0 if start == 0 else _SHOWN_CUT if _event(calls, start) else 1.0


def _event(calls: Sequence[PhaseCall], at: int) -> str:
    """Return what shows that a phase begins with a call; empty if nothing does."""
    if at == 0:
        return ""
    before, call = calls[at - 1], calls[at]
    if call.compacted:
        return "the context was compacted"
    if call.model != before.model and call.agent == before.agent:
        return "another model"
    if (idle_s := call.at - before.at) > FIVE_MINUTES_S:
        return f"after a pause of {idle_s / 60:,.0f} minutes"
    return ""


def _phase(calls: Sequence[PhaseCall], first: int, end: int, before: Phase | None) -> Phase:
    own = calls[first:end]
    made: dict[int, int] = {}
    for call in own:
        made[call.agent] = made.get(call.agent, 0) + 1
    agents = tuple(sorted(made, key=lambda agent: (-made[agent], agent)))
    tokens, shared = sum(call.tokens for call in own), sum(call.shared for call in own)
    phase = Phase(first, end - 1, tokens, shared, agents, "")
    if before is None:
        began = "the session began"
    elif event := _event(calls, first):
        began = event
    elif agents[0] != before.agents[0]:
        began = "another agent at work"
    elif abs(phase.share - before.share) < _SHIFT:
        began = "the agents at work changed"
    else:
        began = "more is shared" if phase.share > before.share else "less is shared"
    return Phase(first, end - 1, tokens, shared, agents, began)
