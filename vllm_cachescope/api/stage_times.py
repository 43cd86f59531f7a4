"""The times that caching itself takes of requests on the API side, by stage."""

from prometheus_client import CollectorRegistry, Histogram

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.metrics import STAGE_SECONDS
from vllm_cachescope.registration import histogram


class StageTimes:
    """Counts how long the stages of requests took.

    Args:
        registry: where the histogram is registered.
        model_name: the model's name in vLLM's own metrics.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._times = histogram(STAGE_SECONDS, registry)
        self._model_name = model_name
        self._of: dict[tuple[str, str], Histogram] = {}

    def count(self, context: RequestContext) -> None:
        """Count the stages of a request that is over, unless they were counted before."""
        stages, context.stages = context.stages, {}
        for stage, seconds in stages.items():
            key = context.engine, stage
            if key not in self._of:
                self._of[key] = self._times.labels(self._model_name, *key)
            self._of[key].observe(seconds)
