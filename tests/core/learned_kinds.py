"""What a learned order takes blocks for."""

from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.return_counts import Kind


def kind_of(order: LearnedOrder, key: bytes) -> Kind:
    """Return the kind of a block that is there."""
    return order._counts.kind(order.runs[key].cell)  # noqa: SLF001
