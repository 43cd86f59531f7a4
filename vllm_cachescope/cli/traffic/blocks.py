"""Block traces: calls of which only the hashes of their blocks are recorded, as by Mooncake."""

from collections.abc import Mapping
from typing import Any

from vllm_cachescope.cli.traffic.call import BLOCK_TOKENS, BlockCall, TrafficError
from vllm_cachescope.cli.traffic.times import in_range


def block_call(source: str, record: Mapping[str, Any]) -> BlockCall:
    """Return the call in ``record``.

    Raises:
        TrafficError: if a field is missing or makes no sense.
    """
    at, tokens, blocks = (record.get(key) for key in ("timestamp", "input_length", "hash_ids"))
    at = in_range(at, 1e3) if isinstance(at, int | float) else None
    if not (
        at is not None
        and isinstance(tokens, int)
        and isinstance(blocks, list)
        and all(isinstance(block, int) for block in blocks)
    ):
        raise TrafficError(
            f"{source}: timestamp, input_length or hash_ids is missing, not a number or no time"
        )
    if not 0 <= tokens <= len(blocks) * BLOCK_TOKENS:
        raise TrafficError(
            f"{source}: input_length {tokens} does not fit {len(blocks)} hash_ids of "
            f"{BLOCK_TOKENS} tokens"
        )
    output = record.get("output_length")
    output = output if isinstance(output, int) and output >= 0 else None
    return BlockCall(source, at, tokens, tuple(blocks), output)
