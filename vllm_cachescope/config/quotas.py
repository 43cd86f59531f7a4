"""The quotas and reserves of organisations on each tier, in bytes."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import ByteSize, Field

from vllm_cachescope.config.values import Model

LOCAL_TIERS = ("device", "cpu")
"""The tiers that every engine has. They know their own capacity."""


class OrgQuota(Model):
    """The quota and the reserve of one organisation on a tier.

    Attributes:
        quota: bytes it may hold; over that, its own oldest entries are evicted. None for no limit.
        reserve: bytes of its entries that other organisations' entries do not evict. None for
            none.
    """

    quota: Annotated[ByteSize, Field(ge=0)] | None = None
    reserve: Annotated[ByteSize, Field(ge=0)] | None = None


class TierQuotas(OrgQuota):
    """The quotas of one tier. Its own ``quota`` and ``reserve`` hold for every organisation for
    which `orgs` has no other.

    Attributes:
        orgs: quotas of single organisations, by a name in `Config.tenants`, a gateway's name, an
            id as ``GET /cachescope/breaks`` shows it, or ``global`` for what everyone shares.
        capacity: bytes that all organisations together may hold, for a tier that does not know its
            own capacity.
    """

    orgs: dict[str, OrgQuota] = Field(default_factory=dict)
    capacity: Annotated[ByteSize, Field(gt=0)] | None = None

    def of(self, org: str | None) -> OrgQuota:
        """Return the quota of the organisation that `orgs` calls ``org``; None for the default."""
        own = self.orgs.get(org, OrgQuota()) if org is not None else OrgQuota()
        return OrgQuota(
            quota=self.quota if own.quota is None else own.quota,
            reserve=self.reserve if own.reserve is None else own.reserve,
        )


def check_quotas(
    quotas: Mapping[str, TierQuotas], tiers: Sequence[str], capacities: Mapping[str, int]
) -> None:
    """Check that all reserves fit, and that there are such tiers.

    Args:
        quotas: the quotas by the tier's name.
        tiers: the names of the tiers there are.
        capacities: bytes that tiers may hold, for those of which the configuration says so.

    Raises:
        ValueError: on quotas that cannot be kept.
    """
    for tier, of_tier in quotas.items():
        key = f"quotas.{tier}"
        if tier not in tiers:
            raise ValueError(f"{key}: there is no such tier; allowed: {', '.join(tiers)}")
        if tier in (*LOCAL_TIERS, *capacities) and of_tier.capacity is not None:
            raise ValueError(f"{key}.capacity: this tier knows its own; leave it out")
        capacity = capacities.get(tier, of_tier.capacity)
        reserved = 0
        for org in (None, *of_tier.orgs):
            quota, org_key = of_tier.of(org), key if org is None else f"{key}.orgs.{org}"
            if not quota.reserve:
                continue
            if org is not None:
                reserved += quota.reserve
            if quota.quota is not None and quota.reserve > quota.quota:
                raise ValueError(
                    f"{org_key}.reserve: {quota.reserve} is more than its quota; "
                    f"allowed: {quota.quota} or less"
                )
            if capacity is None and tier != "device":
                raise ValueError(f"{org_key}: a reserve of this tier needs {key}.capacity")
            if capacity is not None and (total := max(quota.reserve, reserved)) > capacity:
                raise ValueError(
                    f"{org_key}.reserve: more is reserved than the tier can hold (value {total} "
                    f"in all); allowed: {capacity} or less"
                )
