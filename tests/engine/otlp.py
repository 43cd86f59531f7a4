"""A real receiver of OpenTelemetry's traces, in the tests' process."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it was received; ids in hex, times in nanoseconds since the epoch."""

    name: str
    trace_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]


class Receiver(TraceServiceServicer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = Lock()
        self.endpoint = ""

    def Export(self, request, context):
        received = [
            Span(
                span.name,
                span.trace_id.hex(),
                span.parent_span_id.hex(),
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                {one.key: _value(one.value) for one in span.attributes},
            )
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += received
        return ExportTraceServiceResponse()

    def spans(self, which: Callable[[Span], bool], count: int) -> list[Span]:
        """Return the spans that ``which`` picks, once there are ``count`` and no more come."""
        deadline = time.monotonic() + 15
        while True:
            with self._lock:
                found = [span for span in self._spans if which(span)]
            if len(found) >= count or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        with self._lock:
            found = [span for span in self._spans if which(span)]
        assert len(found) == count, found
        return found


@contextmanager
def receive() -> Iterator[Receiver]:
    """Receive traces at ``endpoint`` of what is yielded."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    receiver.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None)


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
