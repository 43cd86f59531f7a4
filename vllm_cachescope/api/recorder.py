"""The recorder: makes the record of each request that is over, and hands it on."""

import time
from collections.abc import Callable, Mapping

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.cache.report import Report
from vllm_cachescope.diagnosis.outcome import UNAVOIDABLE, Diagnosis
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.scope import short_name
from vllm_cachescope.usage.record import RequestRecord, merged_rows

logger = logger_of(__name__)

Sink = Callable[[RequestRecord, Diagnosis | None], None]
"""Takes a record on the event loop's thread, with the request's diagnosis if there is one. It must
not block."""

Trace = Callable[[RequestContext, RequestRecord | None], None]
"""Takes a request that is over, with its record if there is one."""


class Recorder:
    """Makes records on the event loop's thread. A mistake in here costs the record, and never the
    request.

    Args:
        model_name: the model of a request whose body names none.
        replica: the server's name among others.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self, model_name: str, replica: str, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._model_name = model_name
        self._replica = replica
        self._wall_clock = wall_clock
        self._sinks: list[Sink] = []
        self._trace: Trace | None = None

    @property
    def is_used(self) -> bool:
        """Whether anybody wants records."""
        return bool(self._sinks) or self._trace is not None

    def add_sink(self, sink: Sink) -> None:
        """Have ``sink`` called with each record."""
        self._sinks.append(sink)

    def trace_with(self, trace: "Trace") -> None:
        """Have ``trace`` called with each request that is over, recorded or not."""
        self._trace = trace

    def record(
        self, context: RequestContext, diagnosis: Diagnosis | None, response_id: str | None
    ) -> None:
        """Record those prompts of a request that are over, and were not recorded before. There is
        no record where no engine has begun to compute any.

        Args:
            context: the request's context.
            diagnosis: its concluded diagnosis; None if there is none.
            response_id: its response's id; None if that is not known.
        """
        if not self.is_used:
            return
        known = {**context.reports, **context.untold}
        reports = {nonce: known[nonce] for nonce in known if nonce not in context.recorded}
        context.recorded |= reports.keys()
        record = None
        if reports:
            try:
                record = self._record(context, reports, diagnosis, response_id)
            except Exception:
                logger.exception("The request could not be recorded")
        if record is not None:
            self.hand_on(record, diagnosis)
        if self._trace is not None:
            try:
                self._trace(context, record)
            except Exception:
                logger.exception("The trace of a request could not be sent")

    def hand_on(self, record: RequestRecord, diagnosis: Diagnosis | None) -> None:
        """Give a record to everyone who wants records."""
        for sink in self._sinks:
            try:
                sink(record, diagnosis)
            except Exception:
                logger.exception("The record of a request could not be kept")

    def _record(
        self,
        context: RequestContext,
        found: Mapping[str, Report],
        diagnosis: Diagnosis | None,
        response_id: str | None,
    ) -> RequestRecord:
        reports = list(found.values())
        timings = [context.timings[nonce] for nonce in found if nonce in context.timings]
        model = context.request.model if context.request is not None else ""
        record = RequestRecord(
            at=self._wall_clock(),
            org=context.caller.org,
            session=context.caller.session,
            model=short_name(model or self._model_name),
            replica=self._replica,
            engine=_engine(reports),
            request_id=response_id,
            rows=merged_rows(reports),
            output_tokens=sum(timing.output_tokens for timing in timings),
            prefill_seconds_saved=_saved(reports),
            ttft_s=next((ttft for timing in timings if (ttft := timing.ttft_s) is not None), None),
        )
        if diagnosis is None or not diagnosis.measured:
            return record
        return record.diagnosed(
            lineage=diagnosis.lineage,
            cause=diagnosis.cause,
            expected=diagnosis.expected,
            where=_where(diagnosis),
            missed_tokens=_missed(diagnosis),
        )


def _engine(reports: list[Report]) -> int | None:
    if any(report.engine is None for report in reports):
        return None
    return next(report.engine.rank for report in reports if report.engine is not None)


def _saved(reports: list[Report]) -> float | None:
    known = [
        report.prefill_seconds_saved
        for report in reports
        if report.prefill_seconds_saved is not None
    ]
    return sum(known) if known else None


def _where(diagnosis: Diagnosis) -> tuple[str, str] | None:
    """Return the region and the path of a break; None without one."""
    where = diagnosis.where
    is_break = diagnosis.kind.is_break or not diagnosis.expected
    return (where.region, where.path) if where is not None and is_break else None


def _missed(diagnosis: Diagnosis) -> int:
    """Return the tokens that were lost to a change of the client's, or by the cache."""
    lost = sum(miss.tokens for miss in diagnosis.engine if miss.cause not in UNAVOIDABLE)
    return diagnosis.missed_tokens + lost
