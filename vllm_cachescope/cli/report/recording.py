"""A recording: everything that `cachescope report` finds out about some traffic, in one pass.

What grows with the traffic is kept in a temporary file, or packed: some 60 bytes a call.
"""

import marshal
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from vllm_cachescope.cli.block_trace import explain_blocks
from vllm_cachescope.cli.report.best_marking import BestMarking, MarkingSearch, Spent
from vllm_cachescope.cli.report.break_groups import BreakGroups
from vllm_cachescope.cli.report.cost_replay import CostReplay, Floats
from vllm_cachescope.cli.report.ordered_calls import AnyCall
from vllm_cachescope.cli.report.phases import Phase, PhaseCall, find_phases
from vllm_cachescope.cli.report.prompt_view import PromptView, Views
from vllm_cachescope.cli.report.repeats import Repeats
from vllm_cachescope.cli.token_counter import TokenCounter
from vllm_cachescope.cli.traffic import BlockCall, Call
from vllm_cachescope.diagnosis.diagnosis import diagnose
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.usage.prices import Multipliers, Prices
from vllm_cachescope.usage.record import FIVE_MINUTES_S, ONE_HOUR_S

_STORE_BYTES = 64 << 20
_SESSION_TTL_S = 7 * 86400.0
_REQUESTS, _ENDS = 256, 4096
_MAX_AGENTS = 256
_SECRET = b"cachescope report"  # fingerprints never leave this process

RECORDED, SHORT, LONG = range(3)
"""The ways to mark prompts that are always replayed: as recorded; the same breakpoints with all
lifetimes five minutes; and with all an hour."""


@dataclass(slots=True)
class Agent:
    """Calls of one kind: with the same model and the same names of tools.

    Attributes:
        number: its number, from 0, in the order of first calls.
        model: the model's name.
        tools: how many tools it has.
        calls: how many calls it made.
        spent: what became of its tokens, by way to mark them: see `RECORDED`.
    """

    number: int
    model: str
    tools: int
    calls: int = 0
    spent: list[Spent] = field(default_factory=list)

    def __str__(self) -> str:
        """Say which it is, as in ``agent 1 (small-model, 24 tools)``."""
        told = [self.model] if self.model else []
        told += [f"{self.tools} tools"] if self.tools else []
        return f"agent {self.number + 1}" + (f" ({', '.join(told)})" if told else "")


@dataclass(slots=True)
class Lineage:
    """The sums of one lineage.

    Attributes:
        calls, tokens, shared: its calls, the tokens of their prompts, and how many of them an
            earlier call had.
        breaks, missed: its breaks, and the tokens that they cost.
    """

    calls: int = 0
    tokens: int = 0
    shared: int = 0
    breaks: int = 0
    missed: int = 0


@dataclass(slots=True)
class Session:
    """A session's calls, packed.

    Attributes:
        name: what names it: its id, or its file.
        numbers: the calls' numbers in the recording.
        at: when they were sent, in seconds.
        tokens, shared: of each call's prompt, how many tokens it has and an earlier call had.
        agents, models: the number of each call's agent and model.
        compacted: 1 for a call that goes on from a summary.
        lineages: the sums of its lineages, by number.
    """

    name: str
    numbers: "array[int]" = field(default_factory=lambda: array("I"))
    at: "array[float]" = field(default_factory=lambda: array("d"))
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    shared: "array[int]" = field(default_factory=lambda: array("I"))
    agents: "array[int]" = field(default_factory=lambda: array("H"))
    models: "array[int]" = field(default_factory=lambda: array("H"))
    compacted: "array[int]" = field(default_factory=lambda: array("B"))
    lineages: dict[int, Lineage] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all its prompts."""
        return sum(self.tokens)

    def phases(self) -> list[Phase]:
        """Return its phases."""
        packed = zip(
            self.tokens, self.shared, self.agents, self.models, self.at, self.compacted, strict=True
        )
        return find_phases([PhaseCall(*one[:5], bool(one[5])) for one in packed])


class Recording:
    """What some traffic shows. Feed it calls in the order of time, then read it.

    Args:
        count: counts tokens.
        prices: of the models' tokens.
        gap_s: seconds between two calls, where they tell no time.
        min_tokens: tokens of the shortest prefix that a hosted cache keeps.

    Attributes:
        calls: how many calls it has.
        tokens: tokens of all prompts.
        shared: how many of them an earlier call of the same session had, from the first on.
        untimed: how many calls told no time.
        marked: how many calls had breakpoints.
        agents: the agents, by number.
        sessions: the sessions, by organisation and id.
        breaks: the breaks, by place and cause.
        repeats: repeated content that no cache of prefixes finds.
        measured: tokens of calls whose response told its usage, and how many of them were read.
    """

    def __init__(
        self, count: TokenCounter, prices: Prices, gap_s: float, min_tokens: int
    ) -> None:
        self._prices = prices
        self._gap_s = gap_s
        self._fingerprint = Fingerprinter(_SECRET, count=count)
        self._now = 0.0
        self._store = LineageStore(
            lambda: self._now,
            ttl_s=_SESSION_TTL_S,
            requests=_REQUESTS,
            ends=_ENDS,
            org_bytes=_STORE_BYTES,
            max_bytes=_STORE_BYTES,
        )
        self._views = Views()
        self._replay = CostReplay(3, min_tokens)
        self._multipliers: dict[int, Multipliers] = {}
        self._weights: dict[int, float] = {}
        self._search = MarkingSearch(self._multipliers, self._weights, min_tokens)
        self._agent_of: dict[object, Agent] = {}
        self._models: dict[str, int] = {}
        self._rows = TemporaryFile("w+b")  # noqa: SIM115 - as long as the recording lives
        self._best: BestMarking | None = None
        self.calls = self.tokens = self.shared = self.untimed = self.marked = 0
        self.agents: list[Agent] = []
        self.sessions: dict[tuple[str, str | None], Session] = {}
        self.breaks = BreakGroups()
        self.repeats = Repeats()
        self.measured = (0, 0)

    def add(self, path: Path, call: AnyCall) -> None:
        """Add the next call.

        Args:
            path: its file.
            call: the call.
        """
        if call.at is None:
            self.untimed += 1
            self._now += self._gap_s if self.calls else 0.0
        elif self.calls:
            self._now = max(self._now, call.at)
        else:
            self._now = call.at
        if isinstance(call, Call):
            self._add_request(path, call)
        else:
            self._add_blocks(path, call)
        self.calls += 1

    @property
    def best(self) -> BestMarking:
        """The best way to mark this traffic."""
        if self._best is None:
            self._best = self._search.best()
        return self._best

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every call as plain data, in order."""
        self._rows.seek(0)
        while True:
            try:
                yield marshal.load(self._rows)
            except EOFError:
                return

    def _add_request(self, path: Path, call: Call) -> None:
        made = self._fingerprint(call.request, call.extra)
        # Clients that name no session are those of one file.
        caller = Caller("" if call.session else str(path), call.session)
        placement = self._store.observe(caller, made)
        self._store.answered(caller, placement.node, call.response_id)
        diagnosis = diagnose(placement)
        view = self._views.of_call(call, made)
        agent = self._agent((made.model, tuple(tool.name for tool in made.tools)), made)
        repeats = self.repeats.see(call.session, call.request, made, diagnosis.shared_tokens)
        elsewhere = Counter[str]()
        for one in repeats:
            elsewhere[one.scope] += one.tokens
        self._add(path, call, call.session, view, agent, made.model, diagnosis, dict(elsewhere))

    def _add_blocks(self, path: Path, call: BlockCall) -> None:
        raise NotImplementedError

    def _add(
        self,
        path: Path,
        call: AnyCall,
        session_id: str | None,
        view: PromptView,
        agent: Agent,
        model: str,
        diagnosis: Diagnosis,
        elsewhere: Mapping[str, int],
    ) -> None:
        marks = [(block, _lifetimes(ttl_s)) for block, ttl_s in view.marks]
        spent = self._replay.use(self._now, view, marks)
        self._search.add(self._now, agent.number, view)
"""TODO"""
