"""Diagnoses every request, and keeps the breaks for whoever asks."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from vllm_cachescope.diagnosis import (
    Diagnosis,
    EngineCause,
    EngineMiss,
    EngineReport,
    conclude,
    diagnose,
    diagnose_against,
)
from vllm_cachescope.fingerprint import Fingerprinter
from vllm_cachescope.ledger import Reason
from vllm_cachescope.lineage import LineageStore, Placement
from vllm_cachescope.prompt import PromptRequest, Protocol
from vllm_cachescope.report import Report
from vllm_cachescope.scopes import Caller
from vllm_cachescope.wire.diagnostics import (
    anthropic_diagnostics,
    extra_fields,
    openai_diagnostics,
)

REMEMBERED_BREAKS = 1000
"""How many breaks are kept, of all organisations together."""

logger = logging.getLogger("cachescope.breaks")

_CAUSES = {
    Reason.TTL: EngineCause.EXPIRED,
    Reason.CAPACITY: EngineCause.EVICTED,
    Reason.RESET: EngineCause.EVICTED,
}


@dataclass(slots=True)
class Case:
    """One request under diagnosis.

    Attributes:
        caller: whose it is.
        request: the request.
        placement: where it belongs among its session's requests.
        compared: how it differs from the request that the client named; None if it named none,
            or none of its organisation's.
        diagnosis: what the requests' shapes say, and once the engine has reported, the engine.
    """

    caller: Caller
    request: PromptRequest
    placement: Placement
    compared: Diagnosis | None
    diagnosis: Diagnosis

    def answer(self, read_tokens: int | None = None) -> dict[str, Any] | None:
        """Return the diagnostics for the response, in the protocol's own shape; None for none.

        Args:
            read_tokens: tokens read from the cache, once known.
        """
        if self.request.protocol is Protocol.MESSAGES:
            return anthropic_diagnostics(self.request, self.compared)
        return openai_diagnostics(self.request, self.compared, read_tokens=read_tokens)


@dataclass(frozen=True, slots=True)
class Break:
    """A break, or tokens that the cache lost.

    Attributes:
        at: when, in seconds since the epoch.
        caller: whose request it was.
        model: the model it asked for.
        diagnosis: what happened.
    """

    at: float
    caller: Caller
    model: str
    diagnosis: Diagnosis

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            "at": round(self.at, 3),
            "org": self.caller.org,
            "session": self.caller.session,
            "model": self.model,
            **self.diagnosis.to_dict(),
        }


class Breaks:
    """Diagnoses requests one by one, on the event loop's thread.

    Args:
        secret: key of the fingerprints' hashes.
        block_tokens: tokens per block of the engine.
        clock: seconds, never running backwards.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        secret: bytes,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._fingerprint = Fingerprinter(secret)
        self._lineages = LineageStore(clock)
        self._block_tokens = block_tokens
        self._wall_clock = wall_clock
        self._breaks: deque[Break] = deque(maxlen=REMEMBERED_BREAKS)
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
    ) -> Case:
        """Take in a request before it runs.

        Args:
            caller: whose it is.
            request: the request.
            body: its body.
            headers: its headers, names in lower case.
        """
        fingerprint = self._fingerprint(request, extra_fields(body, headers))
        # Found before the request is kept itself, which might push the other one out.
        previous = None
        if request.previous_id is not None:
            previous = self._lineages.find(caller.org, request.previous_id)
        placement = self._lineages.observe(caller, fingerprint)
        compared = None
        if previous is not None:
            # As it is kept: with the turns it goes on from, where it only names them.
            compared = diagnose_against(previous.fingerprint, placement.entry.fingerprint)
        return Case(caller, request, placement, compared, diagnose(placement))

    def close(self, case: Case, reports: Iterable[Report], response_id: str | None) -> None:
        """Complete a diagnosis with what the engine found, once the request is over.

        Args:
            case: from `open`.
            reports: what became of the request's prompts; none if it never ran.
            response_id: the id of its response, by which clients name it.
        """
        reports = list(reports)
        prompt_tokens = sum(report.prompt_tokens for report in reports)
        entry = case.placement.entry
        self._lineages.answered(case.caller, entry, response_id, prompt_tokens or None)
        if not reports:
            return
        found = EngineReport(
            prompt_tokens=prompt_tokens,
            read_tokens=sum(report.read_tokens for report in reports),
            block_tokens=self._block_tokens,
            misses=tuple(miss for report in reports for miss in _misses(report)),
        )
        case.diagnosis = conclude(case.diagnosis, found, case.placement.ancestor)
        self._unknown.inc(case.diagnosis.unknown_tokens)
        if not case.diagnosis.expected or case.diagnosis.kind.is_break:
            self._record(case)

    def recent(self, org: str | None, limit: int = 100) -> list[Break]:
        """Return the latest breaks, newest first.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
        """
        found = (b for b in reversed(self._breaks) if org is None or b.caller.org == org)
        return [b for b, _ in zip(found, range(limit), strict=False)]

    def _record(self, case: Case) -> None:
        diagnosis = case.diagnosis
        seen = Break(self._wall_clock(), case.caller, case.request.model, diagnosis)
        self._breaks.append(seen)
        region = diagnosis.where.region if diagnosis.where else "none"
        self._count.labels(diagnosis.cause, region, str(diagnosis.expected).lower()).inc()
        level = logging.INFO if diagnosis.expected else logging.WARNING
        logger.log(level, "cache break %s", json.dumps(seen.to_dict(), default=str))


def _misses(report: Report) -> Iterable[EngineMiss]:
    loss = report.loss
    if loss is not None:
        reason = Reason(loss.reason)
        yield EngineMiss(
            _CAUSES[reason],
            loss.tokens,
            ttl_s=loss.ttl_s,
            age_s=loss.age_s,
            detail="the cache was reset" if reason is Reason.RESET else None,
        )
