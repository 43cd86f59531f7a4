"""Traces: vLLM's own span of each request gets the usage that the engine has reported.

vLLM sends a span when a request's last token comes, and before it is diagnosed. The span is held
back until then. A request that vLLM sends no span of, since its client has disconnected, gets one
of ours, with the parent that vLLM's would have had.
"""

import contextvars
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.logs import logger_of
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.span_attributes import request_attributes, usage_attributes

logger = logger_of(__name__)

OWN_SPAN = "cachescope_request"
"""Name of the span of a request that vLLM sends none of."""

REQUEST_ID = "gen_ai.request.id"
"""The attribute of vLLM's span that has the request's id."""

_Send = Callable[[Mapping[str, Any]], None]
"""Sends a span with further attributes."""


@dataclass(slots=True)
class PromptTrace:
    """The trace of one prompt.

    Attributes:
        headers: the request's trace headers; None if it came with none.
        began_ns: when it began, in nanoseconds since the epoch.
        held: vLLM's spans of it, one for each sample.
        is_sent: whether a span was sent.
    """

    headers: Mapping[str, str] | None
    began_ns: int
    held: list[_Send] = field(default_factory=list)
    is_sent: bool = False


class Tracer:
    """Holds back vLLM's spans, and sends them with usage.

    Args:
        tracing: vLLM's module of that name.
    """

    def __init__(self, tracing: Any) -> None:
        self._tracing = tracing
        self._instrument: Callable[..., None] = tracing.instrument_manual
        self._traces: dict[str, PromptTrace] = {}

    @classmethod
    def installed(cls, vllm_config: Any) -> "Tracer | None":
        """Return a tracer that vLLM's spans go through from now on; None if vLLM traces nothing."""
        observability = getattr(vllm_config, "observability_config", None)
        if getattr(observability, "otlp_traces_endpoint", None) is None:
            return None
        # Not above: few servers trace.
        tracing: Any = import_module("vllm.tracing")
        output_processor: Any = import_module("vllm.v1.engine.output_processor")
        names = vars(output_processor)
        if "instrument_manual" not in names or not hasattr(tracing, "extract_trace_context"):
            logger.warning("Spans of requests go without usage: this vLLM makes them otherwise")
            return None
        tracer = cls(tracing)
        names["instrument_manual"] = tracer.hold
        return tracer

    def begin(
        self,
        context: RequestContext,
        request_id: str,
        nonce: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        """Note that a prompt is under way.

        Args:
            context: that of its request.
            request_id: its id, which vLLM's span has.
            nonce: its nonce.
            headers: the request's trace headers.
        """
        trace = context.traces.setdefault(nonce, PromptTrace(headers, time.time_ns()))
        self._traces[request_id] = trace

    def end(self, request_id: str) -> None:
        """Note that a prompt is over: vLLM has sent its spans by now, or sends none."""
        self._traces.pop(request_id, None)

    def hold(
        self,
        span_name: str,
        start_time: int,
        end_time: int | None = None,
        attributes: dict[str, Any] | None = None,
        context: Any = None,
        kind: Any = None,
    ) -> None:
        """Do what vLLM's `instrument_manual` does, later if the span is of a prompt of ours."""
        trace = self._traces.get((attributes or {}).get(REQUEST_ID, ""))
        if trace is None:
            self._instrument(span_name, start_time, end_time, attributes, context, kind)
            return
        end_ns = time.time_ns() if end_time is None else end_time
        # Without a parent in the headers, the span's parent is the one that is current now.
        here = contextvars.copy_context()

        def send(more: Mapping[str, Any]) -> None:
            known = {**(attributes or {}), **more}
            here.run(self._instrument, span_name, start_time, end_ns, known, context, kind)

        trace.held.append(send)

    def send(self, context: RequestContext, record: RequestRecord | None) -> None:
        """Send the spans of a request that is over.

        Args:
            context: its context.
            record: its record; None if there is none.
        """
        of_request = {} if record is None else request_attributes(record)
        for nonce, trace in context.traces.items():
            report = context.reports.get(nonce)
            usage: dict[str, Any] = {}
            if report is not None and report.engine is not None and not trace.is_sent:
                usage = usage_attributes(report, context.timings[nonce].output_tokens)
            if not trace.held and usage:
                trace.held.append(self._own_span(trace))
            for send in trace.held:
                # Further samples of a prompt have the same usage, which counts once.
                send({**usage, **of_request} if usage else of_request)
                usage = {}
                trace.is_sent = True
            trace.held.clear()

    def _own_span(self, trace: PromptTrace) -> _Send:
        end_ns = time.time_ns()

        def send(attributes: Mapping[str, Any]) -> None:
            parent = self._tracing.extract_trace_context(trace.headers)
            kind = self._tracing.SpanKind.SERVER
            self._instrument(OWN_SPAN, trace.began_ns, end_ns, dict(attributes), parent, kind)

        return send
