"""Diagnoses each request: opened before the request runs, closed once the engine has reported."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from vllm_cachescope.api.break_log import Break, BreakLog
from vllm_cachescope.api.client_request import ClientRequest
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.peers import ALONE, Peers
from vllm_cachescope.api.pending_diagnosis import PendingDiagnosis
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.api.request_details import RequestDetails
from vllm_cachescope.api.session_exchange import SessionExchange
from vllm_cachescope.cache.report import EngineId, Report
from vllm_cachescope.diagnosis.answer_lines import answer_lines, carried_lines
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.change_places import MeasuredDivergence
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt, prefix_source
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose, diagnose_against
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.placement import Relation
from vllm_cachescope.diagnosis.repaired import UnrepairedRequests
from vllm_cachescope.diagnosis.token_fingerprint import fingerprint_tokens
from vllm_cachescope.metrics import REPAIRED_TOKENS, REPAIRS, UNEXPLAINED_TOKENS
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.registration import counter
from vllm_cachescope.repair.repair import Repair
from vllm_cachescope.repair.session_firsts import SessionFirsts
from vllm_cachescope.tenancy.org_labels import NO_ORG_LABELS, OrgLabels
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.wire.extras import extra_fields


class Diagnoser:
    """Diagnoses requests one by one, on the event loop's thread but for `fingerprint`.

    Args:
        secret: key of the fingerprints' hashes.
        block_tokens: tokens per block of the engine.
        clock: seconds, never running backwards; also the clock of prompts' timings.
        wall_clock: seconds since the epoch.
        diffs: where to write what changed; None to keep no prompt text.
        registry: where the counters are registered.
        peers: the API processes of the server, of which this is one.
        model_name: the model's name in vLLM's own metrics.
        account_of: returns who answers for an organisation, by its id.
        exchange: exchanges notes on sessions with other replicas; None where there is no store
            to do so.
        org_labels: the labels of organisations in metrics.
        details: where to keep the diagnosis of each request; None to keep none but breaks.
        tools_behind_system: whether the chat template renders tools behind the system prompt; None
            while that is not known.
        firsts: returns what other replicas are to know of what came first in a caller's session.
        tell_over: gets the nonces of prompts that nothing will go on from; None if nobody wants to
            know.

    Attributes:
        breaks: the breaks among what was diagnosed.
        peers: the API processes of the server.
    """

    def __init__(
        self,
        secret: bytes,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        diffs: Diffs | None = None,
        registry: CollectorRegistry = REGISTRY,
        model_name: str = "",
        account_of: AccountOf = own_account,
        peers: Peers = ALONE,
        org_labels: OrgLabels = NO_ORG_LABELS,
        details: RequestDetails | None = None,
        tools_behind_system: Callable[[], bool | None] = lambda: None,
        exchange: SessionExchange | None = None,
        firsts: Callable[[Caller], SessionFirsts | None] = lambda _: None,
        tell_over: Callable[[Sequence[str]], object] | None = None,
    ) -> None:
        self._firsts = firsts
        self._exchange = exchange
        self._tell_over = tell_over
        self._details = details
        self.peers = peers
        self.breaks = BreakLog(registry, model_name, account_of, org_labels)
        self._model_name = model_name
        self._tools_behind_system = tools_behind_system
        self._secret = secret
        self._block_tokens = block_tokens
        self._clock = clock
        self._wall_clock = wall_clock
        self._diffs = diffs
        self._fingerprint = Fingerprinter(secret, account_of=account_of)
        self._lineages = LineageStore(clock, account_of=account_of)
        self._unrepaired = UnrepairedRequests(clock, account_of)
        self._org_labels = org_labels
        self._unexplained = counter(UNEXPLAINED_TOKENS, registry)
        self._repairs = counter(REPAIRS, registry, org_labels.are_wanted)
        self._repaired_tokens = counter(REPAIRED_TOKENS, registry, org_labels.are_wanted)

    def fingerprint(
        self,
        caller: Caller,
        request: PromptRequest,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> Fingerprint:
        """Return the fingerprint of a request. Safe to call from any thread."""
        return self._fingerprint(request, extra_fields(body, headers), caller.org)

    def lacks(self, caller: Caller, fingerprint: Fingerprint | None) -> bool:
        """Whether another replica may know what a request goes on from, and this one does not."""
        if self._exchange is None or fingerprint is None:
            return False
        return self._lineages.lacks(caller, fingerprint) is not None

    async def recall(self, caller: Caller, fingerprint: Fingerprint) -> None:
        """Learn what other replicas know of the session of a request. Does not take long."""
        key = self._lineages.lacks(caller, fingerprint)
        if self._exchange is not None and key is not None:
            self._lineages.merge(caller, fingerprint, await self._exchange.recall(key))

    def open(
        self,
        caller: Caller,
        request: PromptRequest,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        reports: Mapping[str, Report] | None = None,
        fingerprint: Fingerprint | None = None,
        client: ClientRequest | None = None,
    ) -> PendingDiagnosis:
        """Place a request among those of its session, before it runs.

        Args:
            caller: whose request it is.
            request: the request.
            body: its body.
            headers: its headers, names in lower case.
            reports: where the engine's reports on its prompts will be; None if no answer will
                need them.
            fingerprint: from `fingerprint`, if it was made on another thread; None to make it.
            client: the request as the client sent it; None if it is not to be repaired.
        """
        if fingerprint is None:
            fingerprint = self.fingerprint(caller, request, body, headers)
        # Looked up first: keeping this request may push out the one that it names.
        named = None
        if request.previous_id is not None:
            named = self._lineages.find(caller.org, request.previous_id)
        placement = self._lineages.observe(caller, fingerprint)
        compared = None
        if named is not None:
            # The kept fingerprint has the earlier turns too, where the request only names them.
            compared = diagnose_against(named.fingerprint, placement.node.fingerprint)
        diagnosis, unrepaired = diagnose(placement), None
        if client is not None:
            if client.repairs:
                fingerprint = client.fingerprint or self.fingerprint(
                    caller, client.request, client.body, headers
                )
            unrepaired = self._unrepaired.observe(caller, fingerprint, client.repairs)
            diagnosis = replace(diagnosis, repaired=unrepaired.repairs)
        return PendingDiagnosis(
            caller,
            request,
            placement,
            named,
            compared,
            diagnosis,
            self._block_tokens,
            # Not `reports or {}`: an empty one will be filled in.
            {} if reports is None else reports,
            self.peers,
            unrepaired,
            self._tools_behind_system() is True,
        )

    def close(
        self,
        pending: PendingDiagnosis,
        reports: Iterable[Report],
        response_id: str | None,
        timings: Iterable[PromptTiming] = (),
        answer: str = "",
    ) -> None:
        """Complete a diagnosis with what the engine found, once the request is over.

        Args:
            pending: from `open`.
            reports: what became of the request's prompts; none if it never ran.
            response_id: the id of its response, by which clients name it.
            timings: when its prompts were computed.
            answer: the end of its answer's text, if its turn is over.
        """
        reports, timings = list(reports), list(timings)
        caller, node = pending.caller, pending.placement.node
        if not reports and response_id is None:
            # The server refused the request, say: no later one can read what it left.
            self._lineages.drop(caller, pending.placement)
            if pending.unrepaired is not None:
                self._unrepaired.drop(caller, pending.unrepaired)
            return
        if pending.unrepaired is not None:
            self._unrepaired.answered(caller, pending.unrepaired, response_id)
        if self._diffs is not None:
            self._diffs.texts.keep(caller, pending.request, node.fingerprint)
        node.nonces = tuple(pending.reports)
        if self._tell_over is not None:
            self._end_conversations(pending, answer, self._tell_over)
        engine = reports[0].engine if reports else None
        if engine is None or not all(report.engine for report in reports):
            # Estimates only: they say nothing of what the cache lost.
            self._lineages.answered(caller, node, response_id)
            self._note(pending)
            return
        found = EngineReport(
            prompt_tokens=sum(report.prompt_tokens for report in reports),
            read_tokens=sum(report.read_tokens for report in reports),
            block_tokens=self._block_tokens,
            misses=tuple(miss for report in reports for miss in report.misses),
            memory_wait_s=max(report.memory_wait_s or 0.0 for report in reports),
        )
        computed: tuple[ComputedPrompt, ...] = ()
        if len(reports) == len(timings):
            computed = tuple(map(self._computed, reports, timings))
            each = tuple(map(partial(self._found, pending), reports, computed))
            found = each[0] if len(each) == 1 else replace(found, prompts=each)
        self._lineages.answered(caller, node, response_id, found.prompt_tokens, computed)
        self._note(pending)
        pending.diagnosis = conclude(
            pending.diagnosis, found, pending.placement.ancestor, node.fingerprint
        )
        repairs = pending.repairs(found.read_tokens)
        pending.diagnosis = replace(pending.diagnosis, repaired=repairs)
        self._count_repairs(caller, engine, repairs)
        unexplained = self._unexplained.labels(self._model_name, str(engine.rank))
        unexplained.inc(pending.diagnosis.unknown_tokens)
        self._record(pending, engine, response_id)

    def _end_conversations(
        self, pending: PendingDiagnosis, answer: str, tell_over: Callable[[Sequence[str]], object]
    ) -> None:
        """Tell which conversations the shape of a request shows to be over: one whose history it
        replaced, and those whose answers it carries."""
        caller, placement = pending.caller, pending.placement
        node, ancestor = placement.node, placement.ancestor
        over: list[str] = []
        if placement.relation is Relation.COMPACTION and ancestor is not None:
            over += ancestor.nonces
        if self._lineages.awaits(caller, node):
            lines = carried_lines(pending.request.parts, self._secret)
            over += self._lineages.ended(caller, node, lines)
        if ancestor is not None and node.lineage == ancestor.lineage:
            ancestor.answer = ()  # It goes on, or did.
        if caller.session is not None:
            node.answer = answer_lines(answer, self._secret)
        if over:
            tell_over(over)

    def _note(self, pending: PendingDiagnosis) -> None:
        """Have other replicas know of a request that was answered."""
        if self._exchange is not None:
            noted = self._lineages.note(pending.caller, pending.placement)
            if noted is not None:
                key, note = noted
                self._exchange.put(key, replace(note, firsts=self._firsts(pending.caller)))

    def _count_repairs(self, caller: Caller, engine: EngineId, repairs: Iterable[Repair]) -> None:
        org = self._org_labels.of(caller.org)
        for repair in repairs:
            labels = self._model_name, str(engine.rank), repair.kind.value, *org
            self._repairs.labels(*labels).inc()
            self._repaired_tokens.labels(*labels).inc(repair.saved_tokens or 0)

    def orgs(self) -> list[str]:
        """Return the organisations of which requests are kept."""
        return self._lineages.orgs()

    def purge(self, org: str | None, session: str | None = None) -> int:
        """Drop what is kept of ``org``, or of one session of ``org``; with None, of everyone.

        Returns:
            How many requests were dropped.
        """
        self.breaks.purge(org, session)
        if self._exchange is not None:
            self._exchange.forget(org, session)
        if self._details is not None:
            self._details.purge(org, session)
        self._fingerprint.purge(org)
        self._unrepaired.purge(org, session)
        if self._diffs is not None:
            self._diffs.purge(org, session)
        return self._lineages.purge(org, session)

    async def purged(self) -> str | None:
        """Wait until what other replicas could know is deleted as well; return why it is not."""
        return None if self._exchange is None else await self._exchange.settled()

    def _found(
        self, pending: PendingDiagnosis, report: Report, computed: ComputedPrompt
    ) -> EngineReport:
        """Return what the engine found for one prompt, with what the session's other requests had
        left."""
        ancestor = pending.placement.ancestor
        earlier = self._lineages.earlier_prompts(pending.caller, pending.placement.node)
        source = prefix_source(computed, earlier)
        shared = None
        if ancestor is not None and not ancestor.computed:
            # The ancestor may never have been computed: only what other requests had counts.
            shared = source.shared_tokens if source else 0
        divergence = None
        if ancestor is not None and len(ancestor.computed) == 1:
            (old,) = ancestor.computed
            token = old.tokens.shared_tokens(computed.tokens)
            step = max(old.tokens.step, computed.tokens.step)
            divergence = MeasuredDivergence(token, step, self._tools_behind_system())
        return EngineReport(
            prompt_tokens=report.prompt_tokens,
            read_tokens=report.read_tokens,
            block_tokens=self._block_tokens,
            misses=report.misses,
            shared_tokens=shared,
            source=source,
            began=computed.began,
            engine=computed.engine,
            unasked=report.unasked,
            reach_s=report.reach_s,
            divergence=divergence,
            memory_wait_s=report.memory_wait_s or 0.0,
        )

    def _computed(self, report: Report, timing: PromptTiming) -> ComputedPrompt:
        assert report.engine is not None
        now, block = self._clock(), self._block_tokens
        computed = report.computed_tokens
        if computed is None:
            computed = report.prompt_tokens
        return ComputedPrompt(
            tokens=fingerprint_tokens(timing.tokens, block, self._secret),
            computed_tokens=computed - computed % block,
            blocks=report.blocks,
            covered_tokens=timing.covered_tokens,
            readable_tokens=timing.readable_tokens,
            ttl_s=max((row.ttl_s for row in report.rows), default=0),
            engine=report.engine,
            began=timing.began,
            computed_at=timing.computed_at or now,
            used_at=now,
        )

    def _record(self, pending: PendingDiagnosis, engine: EngineId, response_id: str | None) -> None:
        caller, diagnosis = pending.caller, pending.diagnosis
        is_break = not diagnosis.expected or diagnosis.kind.is_break
        if not is_break and self._details is None:
            return
        at, model = self._wall_clock(), pending.request.model
        diff = None
        if is_break and self._diffs is not None:
            about = {"model": model, "cause": diagnosis.cause, "lineage": diagnosis.lineage}
            diff = self._diffs.write(caller, diagnosis.changes, at, about)
        seen = Break.of(at, caller, model, diagnosis, diff)
        if is_break:
            self.breaks.add(seen, engine.rank)
        if self._details is not None and response_id is not None:
            self._details.add(response_id, seen)
