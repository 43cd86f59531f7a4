"""A prompt as an engine computed it, and what it left for a later prompt that begins alike."""

from dataclasses import dataclass

from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.token_fingerprint import TokenFingerprint


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """A prompt that an engine computed: what matters to a later prompt that begins alike.

    Attributes:
        tokens: its tokens.
        covered_tokens: leading tokens that a breakpoint covers.
        readable_tokens: leading tokens that any later request of the session may read.
        ttl_s: the longest lifetime of any of its blocks, in seconds.
        engine: the engine.
        computed_at: when the whole prompt had been computed, on the lineage store's clock, in
            seconds.
        used_at: when the request was over, and with it the last use of its blocks.
    """

    tokens: TokenFingerprint
    covered_tokens: int
    readable_tokens: int
    ttl_s: int
    engine: EngineId
    computed_at: float
    used_at: float

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        return 400 + len(self.tokens.hashes)


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """The earlier prompt that a prompt's prefix should have been read from.

    Of all prompts that begin with as many of its tokens, the one that is likeliest to have left
    them where they were looked for.

    Attributes:
        prompt: the earlier prompt.
        shared_tokens: leading tokens that the two have in common, in whole steps of both
            `TokenFingerprint`s.
    """

    prompt: ComputedPrompt
    shared_tokens: int
