"""How much of a tier each organisation may have, counted in the tier's own entries."""

from collections.abc import Mapping

from vllm_cachescope.config import Config, OrgQuota
from vllm_cachescope.tenancy.owner_tags import OwnerTags

SHOWN_ORGS = 20
"""How many organisations the health of a tier names, those that hold most."""


class Quotas:
    """The quotas and reserves of one tier.

    Args:
        entry_bytes: bytes per entry of the tier.
        default: the share of an organisation that ``orgs`` does not name.
        orgs: shares by the organisations' tags.
        capacity: bytes that all organisations together may hold; None if the tier sees to that.
    """

    def __init__(
        self,
        entry_bytes: int,
        default: OrgQuota,
        orgs: Mapping[bytes, OrgQuota],
        capacity: int | None = None,
    ) -> None:
        self._default = _entries(default, entry_bytes)
        self._orgs = {org: _entries(share, entry_bytes) for org, share in orgs.items()}
        self.entry_bytes = entry_bytes
        self.capacity = None if capacity is None else capacity // entry_bytes
        self.has_reserves = any(reserve for _, reserve in (self._default, *self._orgs.values()))

    def quota(self, org: bytes) -> int | None:
        """Return how many entries ``org`` may hold; None for any number."""
        return self._orgs.get(org, self._default)[0]

    def reserve(self, org: bytes) -> int:
        """Return how many entries of ``org`` others do not push out."""
        return self._orgs.get(org, self._default)[1]

    def counts(self, org: bytes) -> bool:
        """Whether it matters how much ``org`` holds."""
        return self.capacity is not None or self.quota(org) is not None

    def over(self, org: bytes, held: int) -> int:
        """Return how many of the ``held`` entries of ``org`` are too many."""
        quota = self.quota(org)
        return 0 if quota is None else max(0, held - quota)


def read_quotas(config: Config, tier: str, entry_bytes: int) -> Quotas | None:
    """Return the shares of ``tier``; None if nothing is configured for it.

    Raises:
        ConfigError: if an organisation is named that is none.
    """
    quotas = config.quotas.get(tier)
    if quotas is None:
        return None
    owners = OwnerTags(config.secret_bytes())
    orgs = {owners.prefix(org): share for org, share in config.org_quotas(tier).items()}
    return Quotas(entry_bytes, quotas.of(None), orgs, quotas.capacity)


def _entries(share: OrgQuota, entry_bytes: int) -> tuple[int | None, int]:
    quota = None if share.quota is None else share.quota // entry_bytes
    # Rounded up, as what is reserved must fit.
    return quota, -(-(share.reserve or 0) // entry_bytes)
