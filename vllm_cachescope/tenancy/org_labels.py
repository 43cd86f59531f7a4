"""The label of an organisation in metrics: its id if the operator asked for it, or ``other``."""

from collections.abc import Collection

from vllm_cachescope.metrics import OTHER_ORG
from vllm_cachescope.tenancy.owner_tags import OwnerTags, org_of

_OTHER = (OTHER_ORG,)


class OrgLabels:
    """The labels of organisations. There are never more of them than the operator has named.

    Args:
        orgs: ids of the organisations that have a label of their own; None if metrics do not tell
            organisations apart.
        secret: key of the owner tags.

    Attributes:
        are_wanted: whether metrics tell organisations apart.
    """

    def __init__(self, orgs: Collection[str] | None, secret: bytes) -> None:
        self.are_wanted = orgs is not None
        self._by_id = {org: (org,) for org in orgs or ()}
        tags = OwnerTags(secret)
        self._by_tag = {tag: (org,) for org in orgs or () for tag in tags.prefixes(org)}

    def of(self, org: str) -> tuple[str, ...]:
        """Return the label of ``org``, an id, as the end of a metric's label values: one value,
        or none if metrics do not tell organisations apart."""
        return self._by_id.get(org, _OTHER) if self.are_wanted else ()

    def of_owner(self, owner: bytes) -> tuple[str, ...]:
        """Return the label of the organisation in an owner; see `of`."""
        return self._by_tag.get(org_of(owner), _OTHER) if self.are_wanted else ()


NO_ORG_LABELS = OrgLabels(None, b"")
"""Where metrics do not tell organisations apart."""
