"""The pressure of organisations on each other: blocks evicted before their time, and for whom."""

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.metrics import ORG_EVICTIONS
from vllm_cachescope.tenancy.org_labels import OrgLabels
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG, org_of

SUFFERED, CAUSED, OWN = "suffered", "caused", "own"
"""An organisation's part in an eviction: its block made room for another organisation's, or the
other way round; or both were its own, as when it is over its quota."""

MAX_ORGS = 10_000
"""Of how many organisations counts are kept until they are taken; those of further ones are one.
Anyone may make organisations up, and where there is no ledger nobody takes them."""


class Pressure:
    """Counts evictions by the organisations that suffered and caused them.

    Args:
        labels: the labels of organisations in metrics.
    """

    def __init__(self, labels: OrgLabels) -> None:
        self._labels = labels
        self._by_label: Counter[tuple[str, ...]] = Counter()
        self._by_org: Counter[tuple[str, str, bytes]] = Counter()

    def add(self, tier: str, reason: EvictionReason, owner: bytes, by: bytes | None) -> None:
        """Count a block that left a tier before its time.

        Args:
            tier: the tier.
            reason: why it left. Only quotas and want of room are pressure.
            owner: whose it was.
            by: the tag of the organisation whose blocks needed the room; None if that is not known.
        """
        org = org_of(owner)
        if reason is EvictionReason.QUOTA or (reason is EvictionReason.CAPACITY and by == org):
            self._count(tier, OWN, org)
        elif reason is EvictionReason.CAPACITY:
            self._count(tier, SUFFERED, org)
            if by is not None:
                self._count(tier, CAUSED, by)

    def take(self) -> list[tuple[str, str, bytes, int]]:
        """Return what was counted since the last time: tier, part, the organisation's tag (zeros
        for what everyone shares), entries."""
        counted, self._by_org = self._by_org, Counter()
        return [(*key, entries) for key, entries in counted.items()]

    def move_to(self, stats: OffloadingConnectorStats) -> None:
        """Add what was counted since the last time to ``stats``."""
        for labels, entries in self._by_label.items():
            stats.increase_counter(ORG_EVICTIONS.name, entries, labels)
        self._by_label.clear()

    def _count(self, tier: str, part: str, org: bytes) -> None:
        self._by_label[tier, part, *self._labels.of_owner(org)] += 1
        key = tier, part, org
        if key not in self._by_org and len(self._by_org) >= MAX_ORGS:
            key = tier, part, UNLISTED_TAG
        self._by_org[key] += 1


def writer_of(owner: bytes) -> bytes:
    """Return the tag of the organisation that wrote a block; of what everyone shares the owner says
    that, too."""
    org = org_of(owner)
    return org if any(org) else owner[len(org) : 2 * len(org)]
