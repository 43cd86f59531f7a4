"""The quotas of the device: which blocks of the prefix cache exceed their organisation's."""

from collections import Counter
from collections.abc import Callable, Collection

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE, DeviceTier


class DeviceQuotas:
    """Finds the blocks that exceed an organisation's quota: its oldest, but for those in use.

    The caller evicts them. vLLM reuses evicted blocks first, so an organisation that is at its
    quota makes room itself for what it computes.

    Args:
        quotas: what each organisation may have.
        tier: the device tier; has to pass over spared blocks, if there are reserves.
        ledger: knows what the tier holds.
        clock: the ledger's clock, in seconds.
    """

    def __init__(
        self, quotas: Quotas, tier: DeviceTier, ledger: Ledger, clock: Callable[[], float]
    ) -> None:
        self._quotas = quotas
        self._tier = tier
        self._clock = clock
        self._order = LifetimeShare(quotas.reserve)
        # Organisations that may hold more blocks than at the last `excess`, or use fewer of them.
        self._changed: set[bytes] = set()
        # Organisations that exceeded their quotas at the last `excess` with blocks in use.
        self._in_use: set[bytes] = set()
        ledger.follow(DEVICE, self._order)
        if quotas.has_reserves:
            tier.keep_reserves(ledger, self._order)

    def note_change(self, org: bytes) -> None:
        """Note that blocks of ``org`` came into the cache, or that requests began or ended that
        run on them."""
        self._changed.add(org)

    def excess(self) -> list[bytes]:
        """Return the keys to evict, since organisations that have changed hold too many."""
        changed, self._changed = self._changed, set()
        keys: list[bytes] = []
        for org in changed:
            over = self._quotas.over(org, self._order.held(org))
            oldest = self._oldest(org, over)
            keys += oldest
            if len(oldest) < over:
                self._in_use.add(org)
            else:
                self._in_use.discard(org)
        return keys

    def retry(self) -> None:
        """Have the next `excess` look again at organisations whose blocks were in use before."""
        self._changed |= self._in_use

    def excess_with(self, newcomers: Counter[bytes], wanted: Collection[bytes]) -> list[bytes]:
        """Return the keys to evict before a request computes blocks.

        Args:
            newcomers: how many blocks the request will add, by organisation.
            wanted: keys that the request reads itself, and that stay.
        """
        keys: list[bytes] = []
        for org, more in newcomers.items():
            over = self._quotas.over(org, self._order.held(org) + more)
            keys += self._oldest(org, over, wanted)
        return keys

    def _oldest(self, org: bytes, blocks: int, wanted: Collection[bytes] = ()) -> list[bytes]:
        """Return up to ``blocks`` of the oldest keys of ``org`` whose blocks are not in use."""
        if not blocks:
            return []
        return self._order.victims_of(
            org, blocks, self._clock(), lambda key: key in wanted or not self._tier.is_free(key)
        )
