"""The operator's defaults for the regions of a prompt, as they hold for its caller."""

from collections.abc import Callable, Mapping

from vllm_cachescope.prompt.global_scope import org_default
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.prompt.segments import RegionDefault, Segment
from vllm_cachescope.tenancy.scope import Caller


class RegionDefaults:
    """The defaults of all regions.

    Args:
        default_of: returns the operator's default for a region.
        may_write_global: whether an organisation, by its id, may share with everyone.
    """

    def __init__(
        self,
        default_of: Callable[[Region], RegionDefault],
        may_write_global: Callable[[str], bool],
    ) -> None:
        self._may_write_global = may_write_global
        self._defaults = {region: default_of(region) for region in Region}
        self._narrow = {region: org_default(one) for region, one in self._defaults.items()}

    def of(self, caller: Caller) -> Mapping[Region, RegionDefault]:
        """Return the defaults for prompts of ``caller``."""
        return self._defaults if self._may_write_global(caller.org) else self._narrow

    def whole(self, caller: Caller) -> Segment:
        """Return the one segment of a prompt of ``caller`` that is cached as a whole."""
        default = self.of(caller)[Region.MESSAGES]
        return Segment(None, default.scope, default.ttl_s, covered=True)
