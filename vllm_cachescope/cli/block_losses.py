"""What whole blocks cost: an engine reads nothing of a prefix that ends within a block."""

from dataclasses import replace

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.findings.loss import Loss
from vllm_cachescope.cli.findings.rules import RULES
from vllm_cachescope.diagnosis.attribution import uncached_by_cause
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind

_GROWS = (DiagnosisKind.CONTINUATION, DiagnosisKind.RETRY)


def in_blocks(
    diagnosis: Diagnosis, prompt: Fingerprint, block: int
) -> tuple[Diagnosis, Loss | None]:
    """Return a diagnosis that reads whole blocks only, and what that costs; None for nothing.

    Args:
        diagnosis: of a call.
        prompt: its fingerprint.
        block: tokens in a block.
    """
    read = diagnosis.prompt_tokens - sum(tokens for _, tokens in diagnosis.uncached)
    tokens = read % block
    if not tokens:
        return diagnosis, None
    miss = CacheMiss(MissCause.PARTIAL_BLOCK, tokens)
    engine = (*diagnosis.engine, miss)
    counted = replace(diagnosis, engine=engine)
    counted = replace(counted, uncached=uncached_by_cause(counted, read - tokens, engine))
    part = next((i for i, end in enumerate(prompt.ends) if end >= read), len(prompt) - 1)
    path = prompt.path(part) if len(prompt) else ""
    pad = block - tokens
    if read < block:
        words = f"{read:,} tokens are shared, and a block has {block:,}: nothing is read"
        advice = f"Share at least {block:,} tokens: {pad:,} more, such as tools or rules of all."
        return counted, Loss(RULES["short_prefix"], path, _place(path), tokens, words, advice)
    if diagnosis.kind in _GROWS:
        words = f"the turn before ended {tokens:,} tokens into a block of {block:,}"
        advice = (
            "Nothing for small blocks: each turn ends somewhere. Where blocks are large, send "
            "fewer and longer turns, or choose smaller blocks for the engine."
        )
        return counted, Loss(RULES["block_straddle"], path, "messages", tokens, words, advice)
    words = f"what is shared ends {tokens:,} tokens into a block of {block:,}"
    advice = (
        f"Add {pad:,} tokens to the end of what is shared (at {path}), or take {tokens:,} away: "
        f"each such call then reads {tokens:,} more."
    )
    return counted, Loss(RULES["block_straddle"], path, _place(path), tokens, words, advice)


def _place(path: str) -> str:
    return path.partition("[")[0] if path.startswith(("messages", "input")) else path
