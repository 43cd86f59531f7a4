"""An output of vLLM's, with the report on what its prompt found in the cache and left there."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vllm_cachescope.cache.report import Report, estimate
from vllm_cachescope.prompt.plan import Plan

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class CachedOutput(Generic[Output]):
    """What became of one prompt.

    Attributes:
        output: vLLM's output.
        cache: the report on the prompt. It is an estimate while the prompt runs, and where the
            engine no longer knows the prompt; an estimate has no `Report.engine`.
    """

    output: Output
    cache: Report


def with_report(
    output: Output, plan: Plan, data: dict[str, Any] | None, block_size: int
) -> CachedOutput[Output]:
    """Return an output with its report.

    Args:
        output: vLLM's output.
        plan: the prompt's plan.
        data: the engine's report, as it travels; None for an estimate.
        block_size: tokens per block.
    """
    if data is not None:
        return CachedOutput(output, Report.from_wire(data))
    read = getattr(output, "num_cached_tokens", None) or 0
    return CachedOutput(output, estimate(plan, block_size, read))
