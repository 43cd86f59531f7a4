"""Keeps organisations to their shares of vLLM's prefix cache."""

from collections import Counter
from collections.abc import Callable, Collection

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE, DeviceTier
from vllm_cachescope.tenancy.owner_tags import org_of


class DeviceQuotas:
    """Has organisations that hold too many blocks lose the oldest ones that no request runs on,
    and has vLLM reuse those first; so they, and nobody else, make room for what they compute.

    Args:
        shares: what each organisation may have.
        tier: the device tier.
        ledger: knows what the tier holds.
        clock: the ledger's clock, in seconds.
        give_up: takes the blocks of keys out of the prefix cache; see `DeviceTier.give_up`.
    """

    def __init__(
        self,
        shares: Quotas,
        tier: DeviceTier,
        ledger: Ledger,
        clock: Callable[[], float],
        give_up: Callable[[Collection[bytes]], None],
    ) -> None:
        self._shares = shares
        self._tier = tier
        self._ledger = ledger
        self._clock = clock
        self._give_up = give_up
        self._order = LifetimeShare(shares.reserve)
        # Organisations of which more may be cached, or free, than the last time; and those of
        # which too much was in use then.
        self._changed: set[bytes] = set()
        self._over: set[bytes] = set()
        ledger.follow(DEVICE, self._order)
        if shares.has_reserves:
            tier.spare(self._org_of, self._order)

    def changed(self, org: bytes) -> None:
        """Note that blocks of ``org`` came into the cache, or into use, or out of it."""
        self._changed.add(org)

    def keep(self) -> None:
        """Have the organisations that have changed lose what they hold too much."""
        changed, self._changed = self._changed, set()
        for org in changed:
            over = self._shares.over(org, self._order.held(org))
            if self._lose(org, over) < over:
                self._over.add(org)
            else:
                self._over.discard(org)

    def keep_all(self) -> None:
        """Do the same for those that could not lose enough before."""
        self._changed |= self._over
        self.keep()

    def make_room(self, newcomers: Counter[bytes], wanted: Collection[bytes]) -> None:
        """Have organisations lose what will be too much once they hold so many blocks more.

        Args:
            newcomers: how many, by organisation.
            wanted: keys that the request that needs the room reads itself.
        """
        for org, more in newcomers.items():
            self._lose(org, self._shares.over(org, self._order.held(org) + more), wanted)

    def _lose(self, org: bytes, blocks: int, wanted: Collection[bytes] = ()) -> int:
        """Give up so many blocks of ``org``, as far as there are any; return how many."""
        if not blocks:
            return 0
        keys = self._order.victims_of(
            org, blocks, self._clock(), lambda key: key in wanted or not self._tier.is_free(key)
        )
        self._give_up(keys)
        return len(keys)

    def _org_of(self, key: bytes) -> bytes | None:
        entry = self._ledger.get(key)
        return None if entry is None else org_of(entry.owner)
