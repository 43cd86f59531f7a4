"""The exporter: a TCP port at which an engine serves its own metrics, where its front end does not
show them, and answers what is asked at its `door`.

No metric of the client library is used: with several API servers those would write into the files
that all processes share, and count twice.
"""

import socket
import threading
from collections.abc import Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_cachescope import metrics
from vllm_cachescope.connectors.vllm.engine.door import EngineDoor
from vllm_cachescope.connectors.vllm.engine.stats import SUM
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import ENGINE_LABELS, ENGINE_METRICS

PATIENCE_S = 5
"""How long a client may be silent, in seconds."""

logger = logger_of(__name__)

_Values = dict[tuple[str, ...], float]


class EngineMetrics(Collector):
    """The sums of what an engine has reported to vLLM's metrics since it started.

    Args:
        labels: the values of `ENGINE_LABELS`.
        by_org: whether metrics tell organisations apart.
    """

    def __init__(self, labels: tuple[str, ...], by_org: bool) -> None:
        self._labels = labels
        self._by_org = by_org
        self._lock = threading.Lock()
        self._values: dict[str, _Values] = {}

    def add(self, data: Mapping[str, Any]) -> None:
        """Add what the engine reports after a step: the ``data`` of vLLM's statistics."""
        values, types = data["data"], data["types"]
        with self._lock:
            for metric in ENGINE_METRICS:
                if metric.name not in values:
                    continue
                known = self._values.setdefault(metric.name, {})
                is_sum = types[metric.name] == "counter"
                for labels, value in values[metric.name].items():
                    known[labels] = value + (known.get(labels, 0.0) if is_sum else 0.0)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as Prometheus' client library writes them."""
        with self._lock:
            values = {name: dict(known) for name, known in self._values.items()}
        return [self._family(metric, values.get(metric.name, {})) for metric in ENGINE_METRICS]

    def _family(self, metric: metrics.Metric, values: _Values) -> Metric:
        names = ENGINE_LABELS + metric.labels_by(self._by_org)
        if metric.kind == "histogram":
            return self._histogram(metric, names, values)
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=names)
        for labels, value in values.items():
            family.add_metric([*self._labels, *labels], value)
        return family

    def _histogram(
        self, metric: metrics.Metric, names: tuple[str, ...], values: _Values
    ) -> HistogramMetricFamily:
        family = HistogramMetricFamily(metric.name, metric.help, labels=names)
        bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
        for labels in dict.fromkeys(labels[:-1] for labels in values):
            below, buckets = 0.0, []
            for number, bound in enumerate(bounds):
                below += values.get((*labels, str(number)), 0.0)
                buckets.append((bound, below))
            total = values.get((*labels, SUM), 0.0)
            family.add_metric([*self._labels, *labels], buckets, total)
        return family


class Exporter:
    """Serves an engine's metrics over HTTP, on a thread of its own.

    Args:
        host: the address to bind to.
        port: the port; 0 for any that is free.
        model_name: the name that the model is served under.
        rank: the engine's number among those behind one API server, from 0.
        by_org: whether metrics tell organisations apart.
        door: answers what is no question for metrics; None for nothing.

    Attributes:
        port: the port that it is bound to.

    Raises:
        OSError: if the port cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        model_name: str,
        rank: int,
        by_org: bool,
        door: EngineDoor | None = None,
    ) -> None:
        self._metrics = EngineMetrics((model_name, str(rank)), by_org)
        registry = CollectorRegistry()
        registry.register(self._metrics)
        server_class = _Server6 if ":" in host else _Server
        app = _app(make_wsgi_app(registry), door)
        self._server = make_server(host, port, app, server_class, Handler)
        self.port: int = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, name="cachescope-metrics", daemon=True
        ).start()

    def add(self, data: Mapping[str, Any]) -> None:
        """Add what the engine reports after a step."""
        self._metrics.add(data)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def start(
    host: str, port: int, model_name: str, rank: int, by_org: bool, door: EngineDoor | None = None
) -> Exporter | None:
    """Start the exporter of an engine; see `Exporter`. The engine runs without one if the port
    cannot be bound: None, and a warning in the log.

    Args:
        host: the address to bind to.
        port: the port of the engine of rank 0.
        model_name: the name that the model is served under.
        rank: the engine's number among those behind one API server, from 0.
        by_org: whether metrics tell organisations apart.
        door: as of `Exporter`.
    """
    try:
        exporter = Exporter(host, port + rank, model_name, rank, by_org, door)
    except (OSError, OverflowError) as error:
        logger.warning(
            "front_end.metrics_port: nothing is served at %s port %d: %s", host, port + rank, error
        )
        return None
    logger.info(
        "Metrics of this engine are served at http://%s:%d/metrics, its health at /health",
        host,
        exporter.port,
    )
    return exporter


class Handler(WSGIRequestHandler):
    """Answers one request."""

    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


def _app(metrics_app: Any, door: EngineDoor | None) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if door is not None and door.answers(environ["PATH_INFO"]):
            return door(environ, start_response)
        shown: Iterable[bytes] = metrics_app(environ, start_response)
        return shown

    return app
