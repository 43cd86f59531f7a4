"""The counts of prompts' tokens, by whether they were tokenised or known."""

from prometheus_client import CollectorRegistry

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.metrics import TOKENIZED_TOKENS
from vllm_cachescope.registration import counter


class TokenizedCounts:
    """Counts how many tokens of prompts were known.

    Args:
        registry: where the counter is registered.
        model_name: the model's name in vLLM's own metrics.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._tokens = counter(TOKENIZED_TOKENS, registry)
        self._model_name = model_name

    def count(self, context: RequestContext) -> None:
        """Count the tokens of a request that is over, unless they were counted before."""
        found = {"known": context.known_tokens, "new": context.new_tokens}
        context.known_tokens = context.new_tokens = 0
        if not any(found.values()):
            return
        for source, tokens in found.items():
            self._tokens.labels(self._model_name, context.engine, source).inc(tokens)
