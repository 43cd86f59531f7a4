"""Counts the markers that were ignored."""

from prometheus_client import CollectorRegistry

from vllm_cachescope.metrics import IGNORED_MARKERS
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.registration import counter


class IgnoredMarkers:
    """Counts the markers, or fields of them, that requests were served without.

    Args:
        registry: where the counter is registered.
        model_name: the model's name in vLLM's own metrics.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._count = counter(IGNORED_MARKERS, registry)
        self._model_name = model_name

    def count(self, request: PromptRequest, engine: str) -> None:
        """Count what was ignored in ``request``, which ``engine`` ran; see `RequestContext`."""
        for marker in request.ignored:
            self._count.labels(self._model_name, engine, marker.reason).inc()
