"""The quotas and reserves of organisations on one tier, counted in the tier's own entries."""

from collections.abc import Mapping

from vllm_cachescope.config import Config, OrgQuota
from vllm_cachescope.tenancy.caller import UNLISTED
from vllm_cachescope.tenancy.owner_tags import (
    NOBODY,
    TAG_BYTES,
    UNLISTED_TAG,
    OwnerTags,
    is_unlisted,
    org_of,
)

SHOWN_ORGS = 20
"""The health of a tier names so many organisations, those that hold most."""


class Quotas:
    """The quotas and reserves of one tier.

    Entries are counted by account. An organisation has one of its own; unlisted organisations,
    which anyone can make up, share one, but for those that ``orgs`` names. Of what everyone shares
    each writer's part is an account, with the quota and the reserve of ``global``.

    Args:
        entry_bytes: bytes per entry of the tier.
        default: quota and reserve of an organisation that ``orgs`` does not name. Unlisted ones
            have no reserve together, unless ``orgs`` has one for `UNLISTED_TAG`.
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
        unlisted = {UNLISTED_TAG: OrgQuota(quota=default.quota)}
        self._orgs = {
            org: _entries(quota, entry_bytes) for org, quota in (unlisted | dict(orgs)).items()
        }
        self.entry_bytes = entry_bytes
        self.capacity = None if capacity is None else capacity // entry_bytes
        self.has_reserves = any(reserve for _, reserve in (self._default, *self._orgs.values()))

    def account_of(self, owner: bytes) -> bytes:
        """Return the account of a block, or of an entry in a store.

        Args:
            owner: its owner, or a key that begins with it. A store's keys do not say who wrote what
                everyone shares; all of that is one account there.
        """
        org = self._account(org_of(owner))
        if org != org_of(NOBODY):
            return org
        return org + self._account(owner[TAG_BYTES : 2 * TAG_BYTES])

    def quota(self, account: bytes) -> int | None:
        """Return how many entries ``account`` may hold; None for any number."""
        return self._orgs.get(org_of(account), self._default)[0]

    def reserve(self, account: bytes) -> int:
        """Return how many entries of ``account`` are not evicted for others."""
        return self._orgs.get(org_of(account), self._default)[1]

    def counts(self, account: bytes) -> bool:
        """Whether the entries of ``account`` must be counted."""
        return self.capacity is not None or self.quota(account) is not None

    def over(self, account: bytes, held: int) -> int:
        """Return by how much ``held`` entries of ``account`` exceed its quota; 0 if they do not."""
        quota = self.quota(account)
        return 0 if quota is None else max(0, held - quota)

    def fullest(self, held: Mapping[bytes, int]) -> float:
        """Return the largest share of its quota that an account holds; 0 if none has a quota.

        Args:
            held: how many entries each account holds.
        """
        largest, most_of_default = 0.0, 0
        # In few steps each: there may be ten thousand accounts, and the scheduler waits.
        for account, entries in held.items():
            if account[:TAG_BYTES] in self._orgs:
                quota = self.quota(account)
                largest = max(largest, entries / quota if quota else float(quota == 0))
            elif entries > most_of_default:
                most_of_default = entries
        if (quota := self._default[0]) is not None and most_of_default:
            largest = max(largest, most_of_default / quota if quota else 1.0)
        return largest

    def _account(self, org: bytes) -> bytes:
        return UNLISTED_TAG if is_unlisted(org) and org not in self._orgs else org


def read_quotas(config: Config, tier: str, entry_bytes: int) -> Quotas | None:
    """Return the quotas and reserves of ``tier``; None if nothing is configured for it.

    Raises:
        ConfigError: if a quota names an organisation that does not exist.
    """
    quotas = config.quotas.get(tier)
    if quotas is None:
        return None
    tags = OwnerTags(config.secret_bytes())
    orgs = {
        tag: quota
        for org, quota in config.org_quotas(tier).items()
        for tag in ([UNLISTED_TAG] if org == UNLISTED else tags.prefixes(org))
    }
    return Quotas(entry_bytes, quotas.of(None), orgs, quotas.capacity)


def _entries(configured: OrgQuota, entry_bytes: int) -> tuple[int | None, int]:
    """Return quota (None for none) and reserve, in entries."""
    quota = None if configured.quota is None else configured.quota // entry_bytes
    # Rounded up, as what is reserved must fit.
    return quota, -(-(configured.reserve or 0) // entry_bytes)
