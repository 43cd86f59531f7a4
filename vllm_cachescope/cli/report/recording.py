"""A recording: all that `cachescope report` finds out about some traffic, in one pass over it."""

import marshal
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.findings.loss import cache_losses, change_loss
from vllm_cachescope.cli.report.best_marking import BestMarking, MarkingSearch, Spent
from vllm_cachescope.cli.report.break_groups import BreakGroups
from vllm_cachescope.cli.report.cost_replay import MIN_TOKENS, CostReplay, Floats, Tokens
from vllm_cachescope.cli.report.ordered_calls import AnyCall
from vllm_cachescope.cli.report.prompt_view import PromptView, Views
from vllm_cachescope.cli.report.repeats import Repeats
from vllm_cachescope.cli.report.sessions import Session, SessionCall
from vllm_cachescope.cli.token_counter import TokenCounter
from vllm_cachescope.cli.traffic import BlockCall, Call
from vllm_cachescope.diagnosis.advice import advise_on_misses
from vllm_cachescope.diagnosis.changes import Change
from vllm_cachescope.diagnosis.diagnosis import diagnose
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.usage.prices import Multipliers, Prices
from vllm_cachescope.usage.record import FIVE_MINUTES_S, ONE_HOUR_S

_SECRET = b"cachescope report"  # fingerprints never leave this process
_STORE_BYTES = 64 << 20
_SESSION_TTL_S = 7 * 86400.0
_REQUESTS, _ENDS = 256, 4096
_MAX_AGENTS = 256
_MAX_MODELS = 1024
_MAX_PREFIXES = 2**18
_CHANGES, _NAMES = 5, 10  # told of a break

RECORDED, SHORT, LONG, FOREVER = range(4)
"""Ways to mark prompts: as recorded; with all lifetimes five minutes; an hour; and for ever."""


@dataclass(slots=True)
class Agent:
    """Calls of one kind: of one model, with tools of the same names; in a text trace, with prompts
    that begin alike.

    Attributes:
        number: its number, from 0, in the order of first calls.
        model: the model's name; empty where none is told.
        tools: how many tools it has.
        calls: how many calls it made.
        spent: what became of its tokens under the ways to mark them, `RECORDED` and so on.
    """

    number: int
    model: str
    tools: int
    calls: int = 0
    _spent: Tokens = field(default_factory=lambda: Tokens.none(4))

    def add(self, tokens: Tokens) -> None:
        """Add a call."""
        self.calls += 1
        self._spent.add(tokens)

    def spent(self, way: int) -> Spent:
        """Return what became of its tokens under one way to mark them."""
        return Spent.of(self._spent, way)


class Recording:
    """What some traffic shows. Give it calls in the order of time, then read it.

    All calls are taken to be of one organisation. What grows with the traffic is in temporary
    files, or packed: some 40 bytes for each call.

    Args:
        count: counts tokens.
        prices: of the models' tokens.
        gap_s: seconds from one call to the next where it tells no time.
        min_tokens: tokens of the shortest prefix that a hosted cache keeps.

    Attributes:
        calls: how many calls there are.
        tokens: tokens of all prompts.
        shared: how many of them an earlier call had, from the first on.
        untimed: how many calls told no time.
        marked: how many calls had breakpoints.
        measured: of calls whose response told it, tokens of the prompts and how many were read.
        agents: the agents, by number.
        sessions: the sessions; by file and None, where calls name none.
        breaks: the breaks.
        repeats: repeated content that no cache of prefixes finds.
    """

    def __init__(self, count: TokenCounter, prices: Prices, gap_s: float, min_tokens: int) -> None:
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
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self._replay = CostReplay(4, min_tokens)
        self._multipliers: dict[int, Multipliers] = {}
        self._weights: dict[int, float] = {}
        self._search = MarkingSearch(self._multipliers, self._weights, min_tokens)
        self._best: BestMarking | None = None
        self._agent_of: dict[object, Agent] = {}
        self._models: dict[str, int] = {}
        self._rows = TemporaryFile("w+b")  # noqa: SIM115 - as long as the recording lives
        self.calls = self.tokens = self.shared = self.untimed = self.marked = 0
        self.measured = (0, 0)
        self.agents: list[Agent] = []
        self.sessions: dict[tuple[str, str | None], Session] = {}
        self.breaks = BreakGroups()
        self.repeats = Repeats()

    @property
    def best(self) -> BestMarking:
        """The best way to mark this traffic. No call may be added after it was read."""
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

    def add(self, path: Path, call: AnyCall) -> None:
        """Add the next call.

        Args:
            path: its file.
            call: the call.
        """
        if call.at is None:
            self.untimed += 1
            self._now += self._gap_s if self.calls else 0.0
        else:
            self._now = max(self._now, call.at) if self.calls else call.at
        if isinstance(call, Call):
            self._add_request(path, call)
        else:
            self._add_blocks(path, call)

    def _add_request(self, path: Path, call: Call) -> None:
        made = self._fingerprint(call.request, call.extra)
        # Clients that name no session are told apart by their files.
        caller = Caller("" if call.session else str(path), call.session)
        placement = self._store.observe(caller, made)
        self._store.answered(caller, placement.node, call.response_id)
        diagnosis = diagnose(placement)
        view = self._views.of_call(call, made)
        shared = max(diagnosis.shared_tokens, self._known(view))
        repeats: Counter[str] = Counter()
        for one in self.repeats.see(call.session, call.request, made, shared):
            repeats[str(one.scope)] += one.tokens
        agent = self._agent(made.model, *(tool.name for tool in made.tools), *_opening(call, made))
        row: dict[str, Any] = {"repeated": dict(repeats)}
        if call.usage is not None:
            row["measured_read"] = call.usage.read_tokens
            tokens, read = self.measured
            self.measured = tokens + call.usage.prompt_tokens, read + call.usage.read_tokens
        head = made.start(made.static_parts)
        self._note(call, caller, view, agent, diagnosis, shared, head, row)

    def _add_blocks(self, path: Path, call: BlockCall) -> None:
        view = self._views.of_blocks(call)
        shared = self._known(view)
        kind = DiagnosisKind.CONTINUATION if shared else DiagnosisKind.NEW_LINEAGE
        diagnosis = Diagnosis(kind, True, None, (), shared, 0, call.tokens, (), lineage=1)
        self._note(call, Caller(str(path)), view, self._agent(""), diagnosis, shared, 0, {})

    def _note(
        self,
        call: AnyCall,
        caller: Caller,
        view: PromptView,
        agent: Agent,
        diagnosis: Diagnosis,
        shared: int,
        head: int,
        row: dict[str, Any],
    ) -> None:
        """Note what is known of a call, whose tools and system prompt have ``head`` tokens."""
        marks = [(block, _lifetimes(ttl_s)) for block, ttl_s in view.marks]
        tokens = self._replay.use(self._now, view, marks)
        self._search.add(self._now, agent.number, view)
        agent.add(tokens)
        own = Spent.of(tokens, RECORDED)
        kept = int(tokens.read[FOREVER])
        # Whether tools and system prompts are stored for others is left to the best marking.
        begun = shared if shared > head else kept
        diagnosis = _with_misses(diagnosis, view, begun, own.read, kept)
        losses = cache_losses(diagnosis)
        if (change := change_loss(diagnosis, None, text=False)) is not None:
            losses.insert(0, change)
        missed, is_break = sum(loss.tokens for loss in losses), bool(losses)
        if losses:
            self.breaks.add(call.source, losses)
        model = self._models.setdefault(agent.model, min(len(self._models), _MAX_MODELS))
        session = self._session(caller)
        session.add(
            SessionCall(
                self.calls,
                self._now,
                view.tokens,
                shared,
                own.read,
                missed,
                diagnosis.lineage,
                agent.number,
                model,
                diagnosis.kind is DiagnosisKind.CONTEXT_COMPACTED,
                is_break,
            )
        )
        where = diagnosis.where
        row |= {
            "number": self.calls,
            "source": call.source,
            "at": round(self._now, 3),
            "timed": call.at is not None,
            "session": session.name,
            "session_number": session.number,
            "lineage": diagnosis.lineage,
            "agent": agent.number,
            "model": agent.model,
            "tokens": view.tokens,
            "shared": shared,
            "read": own.read,
            "created": {"5m": own.short, "1h": own.long},
            "uncached": own.uncached,
            "kind": str(diagnosis.kind),
            "cause": str(diagnosis.cause),
            "expected": diagnosis.expected,
            "break": is_break,
            "region": where.region if where and is_break else None,
            "path": where.path if where and is_break else None,
            "missed": missed,
            "changes": [_plain(one) for one in diagnosis.changes[:_CHANGES]] if is_break else [],
            "suggestion": next((one.suggestion for one in losses if one.suggestion), ""),
        }
        marshal.dump(row, self._rows)
        self.calls += 1
        self.tokens += view.tokens
        self.shared += shared
        self.marked += view.marked

    def _known(self, view: PromptView) -> int:
        """Record a prompt's prefixes. Return how many leading tokens any earlier call had."""
        prefixes, shared, reading = self._prefixes, 0, True
        for key, end in zip(view.keys, view.ends, strict=True):
            if key in prefixes:
                prefixes.move_to_end(key)
                shared = end if reading else shared
                continue
            reading = False
            prefixes[key] = None
            if len(prefixes) > _MAX_PREFIXES:
                prefixes.popitem(last=False)
        return shared

    def _agent(self, model: str, *traits: str | bytes) -> Agent:
        """Return the agent with a model, and tools of these names or prompts that begin alike."""
        key = model, *traits
        agent = self._agent_of.get(key)
        if agent is None:
            if len(self.agents) >= _MAX_AGENTS:
                # All others count as one of the same model, or as any one.
                alike = (one for one in reversed(self.agents) if one.model == model)
                return next(alike, self.agents[-1])
            tools = sum(isinstance(trait, str) for trait in traits)
            agent = self._agent_of[key] = Agent(len(self.agents), model, tools)
            self.agents.append(agent)
            if (price := self._prices.of(model)) is not None:
                self._multipliers[agent.number] = price.multipliers
                self._weights[agent.number] = price.input
        return agent

    def _session(self, caller: Caller) -> Session:
        key = caller.org, caller.session
        found = self.sessions.get(key)
        if found is None:
            found = self.sessions[key] = Session(len(self.sessions), caller.session or caller.org)
        return found


def _opening(call: Call, fingerprint: Fingerprint) -> Iterable[bytes]:
    """Return a hash of how a text trace's prompt begins: nothing else tells agents apart there."""
    return (fingerprint.hash(0),) if call.text and len(fingerprint) else ()


def _plain(change: Change) -> dict[str, Any]:
    """Return a change as plain data, as breaks are listed by a server."""
    return {
        "kind": str(change.kind),
        "path": change.path,
        "names": list(change.names[:_NAMES]),
        "fields": list(change.fields[:_NAMES]),
        "before": change.before,
        "after": change.after,
        "chars_before": change.chars_before,
        "chars_after": change.chars_after,
    }


def _lifetimes(ttl_s: int) -> Floats:
    """Return the lifetimes of a recorded breakpoint, by way to mark prompts."""
    return np.array([ttl_s, FIVE_MINUTES_S, ONE_HOUR_S, np.inf], np.float32)


def _with_misses(
    diagnosis: Diagnosis, view: PromptView, shared: int, read: int, kept: int
) -> Diagnosis:
    """Return a diagnosis that tells what a cache would not have had although nothing had changed.

    Args:
        diagnosis: what the shapes of the requests say.
        view: the prompt.
        shared: how many leading tokens an earlier call had.
        read: how many a cache reads that is used as recorded.
        kept: how many one would read that keeps everything for ever.
    """
    misses: list[CacheMiss] = []
    if kept > read:
        ttl_s = max((ttl_s for _, ttl_s in view.marks), default=None)
        misses.append(CacheMiss(MissCause.EXPIRED, kept - read, ttl_s=ttl_s))
    # Less is what is shared of a block that differs further on.
    if view.marked and shared - kept >= MIN_TOKENS:
        misses.append(CacheMiss(MissCause.NEVER_STORED, shared - kept))
    if not misses or diagnosis.kind.is_break:
        return diagnosis
    told = advise_on_misses(misses)
    return replace(diagnosis, expected=False, engine=tuple(misses), suggestion=told)
