"""Diagnoses every request, and keeps the breaks for whoever asks."""

import heapq
import itertools
import json
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from prometheus_client import Counter

from vllm_cachescope.api.diagnostics import (
    anthropic_diagnostics,
    extra_fields,
    openai_diagnostics,
)
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.cache.report import EngineId, Report
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose, diagnose_against, measure
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.diagnosis.token_fingerprint import fingerprint_tokens
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.tenancy.scope import Caller

REMEMBERED_BREAKS = 100
"""How many breaks are kept of one organisation, the latest."""

REMEMBERED_ORGS = 100
"""Of how many organisations, those that had a break last."""

LISTED_CHANGES = 20
"""How many changes a break lists, the earliest in the prompt."""

LISTED_NAMES = 10
"""How many names a change of a break lists, and how many fields."""

logger = logging.getLogger("cachescope.breaks")


@dataclass(slots=True)
class PendingDiagnosis:
    """One request under diagnosis.

    Attributes:
        caller: whose it is.
        request: the request.
        placement: where it belongs among its session's requests.
        named: the request that the client named; None if it named none, or none of its
            organisation's.
        compared: how it differs from that one; token counts are estimates.
        diagnosis: what the requests' shapes say, and once the engine has reported, the engine.
        block_tokens: tokens per block of the engine.
        reports: what became of each of its prompts; the engine's side puts it in as it learns.
    """

    caller: Caller
    request: PromptRequest
    placement: LineagePlacement
    named: LineageNode | None
    compared: Diagnosis | None
    diagnosis: Diagnosis
    block_tokens: int
    reports: Mapping[str, Report]

    def answer(self, read_tokens: int | None = None) -> dict[str, Any] | None:
        """Return the diagnostics for the response, in the protocol's own shape; None for none.

        Args:
            read_tokens: tokens read from the cache, once known.
        """
        compared = self.compared
        if compared is not None and read_tokens is not None:
            prompt = sum(report.prompt_tokens for report in self.reports.values())
            compared = measure(
                compared, EngineReport(prompt, read_tokens, self.block_tokens), self.named
            )
        if self.request.protocol is Protocol.MESSAGES:
            return anthropic_diagnostics(self.request, compared)
        return openai_diagnostics(self.request, compared, read_tokens=read_tokens)


@dataclass(frozen=True, slots=True)
class Break:
    """A break, or tokens that the cache lost.

    Attributes:
        at: when, in seconds since the epoch.
        caller: whose request it was.
        model: the model it asked for.
        diagnosis: what happened, with as many changes, names and fields as are listed.
        more_changes: how many changes are not listed.
        more_names: how many names, and how many fields, each of the listed changes leaves out.
        diff: name of the file with what changed, if it was written; for the operator only.
    """

    at: float
    caller: Caller
    model: str
    diagnosis: Diagnosis
    more_changes: int = 0
    more_names: tuple[tuple[int, int], ...] = ()
    diff: str | None = None

    @classmethod
    def of(
        cls, at: float, caller: Caller, model: str, diagnosis: Diagnosis, diff: str | None
    ) -> "Break":
        """Return a break that lists no more of ``diagnosis`` than may be listed.

        A client may change hundreds of tools with names as long as it likes, all the time.
        """
        listed = diagnosis.changes[:LISTED_CHANGES]
        cut = (
            replace(c, names=c.names[:LISTED_NAMES], fields=c.fields[:LISTED_NAMES]) for c in listed
        )
        return cls(
            at,
            caller,
            model,
            replace(diagnosis, changes=tuple(cut)),
            len(diagnosis.changes) - len(listed),
            tuple((_rest(c.names), _rest(c.fields)) for c in listed),
            diff,
        )

    def to_dict(self, for_operator: bool = False) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        data = self.diagnosis.to_dict()
        for change, (names, fields) in zip(data["changes"], self.more_names, strict=True):
            change |= {"more_names": names} if names else {}
            change |= {"more_fields": fields} if fields else {}
        return {
            **({"diff": self.diff} if for_operator and self.diff else {}),
            "at": round(self.at, 3),
            "org": self.caller.org,
            "session": self.caller.session,
            "model": self.model,
            **data,
            **({"more_changes": self.more_changes} if self.more_changes else {}),
        }


def _rest(names: Sequence[str]) -> int:
    return max(0, len(names) - LISTED_NAMES)


class BreakLog:
    """Diagnoses requests one by one, on the event loop's thread.

    Args:
        secret: key of the fingerprints' hashes.
        block_tokens: tokens per block of the engine.
        clock: seconds, never running backwards; also that of passages.
        wall_clock: seconds since the epoch.
        diffs: where to write what changed; None to keep no prompt text.
    """

    def __init__(
        self,
        secret: bytes,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        diffs: Diffs | None = None,
    ) -> None:
        self._secret = secret
        self._clock = clock
        self._fingerprint = Fingerprinter(secret)
        self._lineages = LineageStore(clock)
        self._block_tokens = block_tokens
        self._wall_clock = wall_clock
        self._diffs = diffs
        # By organisation, the one that had a break last at the end; numbered as they came.
        self._breaks: OrderedDict[str, deque[tuple[int, Break]]] = OrderedDict()
        self._numbers = itertools.count()
        self._count = Counter(
            "cachescope_breaks",
            "Requests that could not read from the cache as far as an earlier request of their "
            "session would have let them, by cause and by the region of the prompt that changed.",
            ("cause", "region", "expected"),
        )
        self._unknown = Counter(
            "cachescope_unexplained_tokens",
            "Tokens that were not in the cache for no known reason. Any is a bug to report.",
        )

    def open(
        self,
        caller: Caller,
        request: PromptRequest,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        reports: Mapping[str, Report] | None = None,
    ) -> PendingDiagnosis:
        """Take in a request before it runs.

        Args:
            caller: whose it is.
            request: the request.
            body: its body.
            headers: its headers, names in lower case.
            reports: where the engine's reports on it will be; None if no answer will need them.
        """
        fingerprint = self._fingerprint(request, extra_fields(body, headers))
        # Found before the request is kept itself, which might push the other one out.
        named = None
        if request.previous_id is not None:
            named = self._lineages.find(caller.org, request.previous_id)
        placement = self._lineages.observe(caller, fingerprint)
        compared = None
        if named is not None:
            # As it is kept: with the turns it goes on from, where it only names them.
            compared = diagnose_against(named.fingerprint, placement.node.fingerprint)
        return PendingDiagnosis(
            caller,
            request,
            placement,
            named,
            compared,
            diagnose(placement),
            self._block_tokens,
            # Empty as yet, most often, and the exchange's own all the same.
            {} if reports is None else reports,
        )

    def close(
        self,
        case: PendingDiagnosis,
        reports: Iterable[Report],
        response_id: str | None,
        passages: Iterable[PromptTiming] = (),
    ) -> None:
        """Complete a diagnosis with what the engine found, once the request is over.

        Args:
            case: from `open`.
            reports: what became of the request's prompts; none if it never ran.
            response_id: the id of its response, by which clients name it.
            passages: how its prompts passed through the engine.
        """
        reports, passages = list(reports), list(passages)
        caller, node = case.caller, case.placement.node
        if not reports and response_id is None:
            # Refused, say: the next request owes nothing to it.
            self._lineages.drop(caller, case.placement)
            return
        if self._diffs is not None:
            self._diffs.keep(caller, case.request, node.fingerprint)
        engine = reports[0].engine if reports else None
        if engine is None or not all(report.engine for report in reports):
            # Without the engine's last word there is nothing to put its misses down to.
            self._lineages.answered(caller, node, response_id)
            return
        found = EngineReport(
            prompt_tokens=sum(report.prompt_tokens for report in reports),
            read_tokens=sum(report.read_tokens for report in reports),
            block_tokens=self._block_tokens,
            misses=tuple(miss for report in reports for miss in report.misses),
        )
        computed = None
        if len(reports) == len(passages) == 1:
            computed = self._computed(reports[0], engine, passages[0])
            found = self._compared(case, found, reports[0], computed, passages[0].began)
        self._lineages.answered(caller, node, response_id, found.prompt_tokens, computed)
        case.diagnosis = conclude(case.diagnosis, found, case.placement.ancestor)
        self._unknown.inc(case.diagnosis.unknown_tokens)
        if not case.diagnosis.expected or case.diagnosis.kind.is_break:
            self._record(case)

    def _compared(
        self,
        case: PendingDiagnosis,
        found: EngineReport,
        report: Report,
        computed: ComputedPrompt,
        began: float,
    ) -> EngineReport:
        """Complete what the engine found with what the session's other requests had left."""
        ancestor = case.placement.ancestor
        source = self._lineages.prefix_source(
            case.caller, case.placement.node, computed.tokens, computed.engine, began
        )
        shared = None
        if ancestor is not None and ancestor.computed is None:
            # Whatever it was, it may never have been computed: only what others had counts.
            shared = source.shared_tokens if source else 0
        return replace(
            found,
            began=began,
            engine=computed.engine,
            unasked=report.unasked,
            reach_s=report.reach_s,
            source=source,
            shared_tokens=shared,
        )

    def _computed(self, report: Report, engine: EngineId, passage: PromptTiming) -> ComputedPrompt:
        now = self._clock()
        return ComputedPrompt(
            tokens=fingerprint_tokens(passage.tokens, self._block_tokens, self._secret),
            covered_tokens=passage.covered_tokens,
            readable_tokens=passage.readable_tokens,
            ttl_s=max((row.ttl_s for row in report.rows), default=0),
            engine=engine,
            computed_at=passage.computed_at or now,
            used_at=now,
        )

    def recent(self, org: str | None, limit: int = 100) -> list[Break]:
        """Return the latest breaks, newest first.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
        """
        of = self._breaks.values() if org is None else (self._breaks.get(org, ()),)
        latest = heapq.nlargest(limit, itertools.chain.from_iterable(of), key=itemgetter(0))
        return [seen for _, seen in latest]

    def orgs(self) -> list[str]:
        """Return the organisations of which requests are remembered."""
        return self._lineages.orgs()

    def forget(self, org: str | None, session: str | None = None) -> int:
        """Forget the requests and breaks of ``org``, or of one session of it, or all; return how
        many requests."""
        for one in [org] if org is not None else list(self._breaks):
            known = self._breaks.get(one, ())
            others = [b for b in known if session is not None and b[1].caller.session != session]
            self._breaks[one] = deque(others, REMEMBERED_BREAKS)
            if not others:
                del self._breaks[one]
        self._fingerprint.purge()  # Tools' names are in it, and not whose they are.
        if self._diffs is not None:
            self._diffs.forget(org, session)
        return self._lineages.purge(org, session)

    def _record(self, case: PendingDiagnosis) -> None:
        diagnosis = case.diagnosis
        at, model = self._wall_clock(), case.request.model
        diff = None
        if self._diffs is not None:
            about = {"model": model, "cause": diagnosis.cause, "lineage": diagnosis.lineage}
            diff = self._diffs.write(case.caller, diagnosis.changes, at, about)
        seen = Break.of(at, case.caller, model, diagnosis, diff)
        org = case.caller.org
        known = self._breaks.setdefault(org, deque(maxlen=REMEMBERED_BREAKS))
        known.append((next(self._numbers), seen))
        self._breaks.move_to_end(org)
        if len(self._breaks) > REMEMBERED_ORGS:
            self._breaks.popitem(last=False)
        region = diagnosis.where.region if diagnosis.where else "none"
        self._count.labels(diagnosis.cause, region, str(diagnosis.expected).lower()).inc()
        level = logging.INFO if diagnosis.expected else logging.WARNING
        logger.log(
            level, "cache break %s", json.dumps(seen.to_dict(for_operator=True), default=str)
        )
