"""What becomes of a cache marker that is wrong, or stands where its protocol has none."""

from typing import Literal

from vllm_cachescope.config.values import Model
from vllm_cachescope.prompt.request import Protocol

Strictness = Literal["lenient", "strict"]


class MarkerPolicy(Model):
    """Whether a wrong marker refuses its request (``strict``) or is ignored (``lenient``).

    Attributes:
        openai: on OpenAI's endpoints. Plain vLLM ignores markers there, so no client that works
            with it need change.
        anthropic: on ``/v1/messages``. Anthropic's API refuses what is wrong, and so does
            ``strict``.
    """

    openai: Strictness = "lenient"
    anthropic: Strictness = "strict"

    def is_strict(self, protocol: Protocol) -> bool:
        """Tell whether a wrong marker refuses a request of ``protocol``."""
        policy = self.anthropic if protocol is Protocol.MESSAGES else self.openai
        return policy == "strict"
