"""The health of the tiers in the engine's own memory: the device and the CPU tier."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.cache.quotas import SHOWN_ORGS


@dataclass(frozen=True, slots=True)
class TierInfo:
    """The fixed facts of a tier in the engine's own memory. Such a tier is always up.

    Attributes:
        name: ``device`` or ``cpu``.
        address: where the tier is, for the operator to read.
        entry_bytes: bytes per entry: a block on the device, a chunk in the CPU tier.
        capacity_bytes: bytes that the tier can hold.
    """

    name: str
    address: str
    entry_bytes: int
    capacity_bytes: int

    def health(self, held: Mapping[bytes, int]) -> dict[str, Any]:
        """Return the tier's state as plain data, as `RemoteTier.health` does for remote tiers.

        Args:
            held: how many entries each organisation has in the tier, by the organisation's tag.
        """
        return {
            "name": self.name,
            "address": self.address,
            "up": True,
            "reason": None,
            "used_bytes": sum(held.values()) * self.entry_bytes,
            "capacity_bytes": self.capacity_bytes,
            "orgs": {
                org.hex(): entries * self.entry_bytes
                for org, entries in Counter(held).most_common(SHOWN_ORGS)
            },
        }
