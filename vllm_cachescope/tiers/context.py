"""The context of a remote tier: what its parts share."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_cachescope.tiers.availability import Availability
from vllm_cachescope.tiers.block_states import BlockStates
from vllm_cachescope.tiers.envelope import Envelopes
from vllm_cachescope.tiers.inventory import Inventory
from vllm_cachescope.tiers.key_counts import KeyCounts
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.operation_times import OperationTimes
from vllm_cachescope.tiers.store import Store


@dataclass(frozen=True, slots=True)
class TierContext:
    """What the parts of one remote tier share. All of it is safe for several threads.

    Attributes:
        name: the tier's name.
        new_store: makes a store for one thread; must not connect yet.
        slot_bytes: bytes per block.
        envelopes: seals and opens the values.
        limits: what the tier may cost.
        clock: seconds, never running backwards; the clock of all deadlines.
        availability: whether the store may be used.
        states: the states of blocks in the store.
        counts: numbers of keys by operation and outcome.
        times: how long exchanges with the store took.
        local_usage: finds the entries that are too many; None if there are no quotas, or the store
            counts itself.
        inventory: what this engine has stored, for routers; None if KV events are off.
    """

    name: str
    new_store: Callable[[], Store]
    slot_bytes: int
    envelopes: Envelopes
    limits: Limits
    clock: Callable[[], float]
    availability: Availability
    states: BlockStates
    counts: KeyCounts
    times: OperationTimes
    local_usage: LocalUsage | None
    inventory: Inventory | None

    def timeout_at(self) -> float:
        """Return the deadline of an operation that begins now and that no request waits for."""
        return self.clock() + self.limits.timeout_s
