"""The quotas and reserves of organisations on one tier, counted in the tier's own entries."""

from collections.abc import Mapping

from vllm_cachescope.config import Config, OrgQuota
from vllm_cachescope.tenancy.owner_tags import OwnerTags

SHOWN_ORGS = 20
"""The health of a tier names so many organisations, those that hold most."""


class Quotas:
    """The quotas and reserves of one tier.

    Args:
        entry_bytes: bytes per entry of the tier.
        default: quota and reserve of an organisation that ``orgs`` does not name.
        orgs: quotas and reserves by the organisations' tags.
        capacity: bytes that all organisations together may hold; None if the tier itself keeps to
            its capacity.
    """

    def __init__(
        self,
        entry_bytes: int,
        default: OrgQuota,
        orgs: Mapping[bytes, OrgQuota],
        capacity: int | None = None,
    ) -> None:
        self._default = _entries(default, entry_bytes)
        self._orgs = {org: _entries(quota, entry_bytes) for org, quota in orgs.items()}
        self.entry_bytes = entry_bytes
        self.capacity = None if capacity is None else capacity // entry_bytes
        self.has_reserves = any(reserve for _, reserve in (self._default, *self._orgs.values()))

    def quota(self, org: bytes) -> int | None:
        """Return how many entries ``org`` may hold; None for any number."""
        return self._orgs.get(org, self._default)[0]

    def reserve(self, org: bytes) -> int:
        """Return how many entries of ``org`` are not evicted for other organisations."""
        return self._orgs.get(org, self._default)[1]

    def counts(self, org: bytes) -> bool:
        """Whether the entries of ``org`` must be counted."""
        return self.capacity is not None or self.quota(org) is not None

    def over(self, org: bytes, held: int) -> int:
        """Return by how much ``held`` entries of ``org`` exceed its quota; 0 if they do not."""
        quota = self.quota(org)
        return 0 if quota is None else max(0, held - quota)


def read_quotas(config: Config, tier: str, entry_bytes: int) -> Quotas | None:
    """Return the quotas and reserves of ``tier``; None if nothing is configured for it.

    Raises:
        ConfigError: if a quota names an organisation that does not exist.
    """
    quotas = config.quotas.get(tier)
    if quotas is None:
        return None
    tags = OwnerTags(config.secret_bytes())
    orgs = {tags.prefix(org): quota for org, quota in config.org_quotas(tier).items()}
    return Quotas(entry_bytes, quotas.of(None), orgs, quotas.capacity)


def _entries(configured: OrgQuota, entry_bytes: int) -> tuple[int | None, int]:
    """Return quota (None for none) and reserve, in entries."""
    quota = None if configured.quota is None else configured.quota // entry_bytes
    # Rounded up, as what is reserved must fit.
    return quota, -(-(configured.reserve or 0) // entry_bytes)
