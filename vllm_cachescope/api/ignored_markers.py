"""Counts the markers that were ignored."""

from prometheus_client import CollectorRegistry

from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.registration import TotalCounter


class IgnoredMarkers:
    """Counts the markers, or fields of them, that requests were served without.

    Args:
        registry: where the counter is registered.
        model_name: the model's name in vLLM's own metrics.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        counter = TotalCounter(
            "cachescope_ignored_markers",
            "Cache markers, or fields of them, that did not count as they were written, by reason "
            f"({', '.join(IgnoredReason)}).",
            ("model_name", "reason"),
            registry=registry,
        )
        self._by_reason = {reason: counter.labels(model_name, reason) for reason in IgnoredReason}

    def count(self, request: PromptRequest) -> None:
        """Count what was ignored in ``request``."""
        for marker in request.ignored:
            self._by_reason[marker.reason].inc()
