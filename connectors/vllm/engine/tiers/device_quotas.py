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
        # Accounts that may hold more blocks than at the last `excess`, or use fewer of them.
        self._changed: set[bytes] = set()
        # Accounts that exceeded their quotas at the last `excess` with blocks in use.
        self._in_use: set[bytes] = set()
        ledger.follow(DEVICE, self._order, quotas.account_of)
        if quotas.has_reserves:
            tier.keep_reserves(ledger, self._order, quotas.account_of)

    def note_change(self, owner: bytes) -> None:
        """Note that blocks of ``owner`` came into the cache, or that requests began or ended that
        run on them."""
        self._changed.add(self._quotas.account_of(owner))

    def excess(self) -> list[bytes]:
        """Return the keys to evict, since accounts that have changed hold too many."""
        changed, self._changed = self._changed, set()
        keys: list[bytes] = []
        for account in changed:
            over = self._quotas.over(account, self._order.held(account))
            oldest = self._oldest(account, over)
            keys += oldest
            if len(oldest) < over:
                self._in_use.add(account)
            else:
                self._in_use.discard(account)
        return keys

    def fullest(self) -> float:
        """Return the largest share of its quota that an account holds."""
        return self._quotas.fullest(self._order.accounts)

    def retry(self) -> None:
        """Have the next `excess` look again at accounts whose blocks were in use before."""
        self._changed |= self._in_use

    def excess_with(self, newcomers: Counter[bytes], wanted: Collection[bytes]) -> list[bytes]:
        """Return the keys to evict before a request computes blocks.

        Args:
            newcomers: how many blocks the request will add, by owner.
            wanted: keys that the request reads itself, and that stay.
        """
        keys: list[bytes] = []
        added: Counter[bytes] = Counter()
        for owner, more in newcomers.items():
            added[self._quotas.account_of(owner)] += more
        for account, more in added.items():
            over = self._quotas.over(account, self._order.held(account) + more)
            keys += self._oldest(account, over, wanted)
        return keys

    def _oldest(self, account: bytes, blocks: int, wanted: Collection[bytes] = ()) -> list[bytes]:
        """Return up to ``blocks`` of the oldest keys of ``account`` whose blocks are not in use."""
        if not blocks:
            return []
        return self._order.victims_of(
            account, blocks, self._clock(), lambda key: key in wanted or not self._tier.is_free(key)
        )
