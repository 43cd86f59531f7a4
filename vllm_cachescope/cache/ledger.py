"""The ledger of cached blocks: on which tiers each one is, and until when."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of

NOWHERE: frozenset[str] = frozenset()


@dataclass(slots=True)
class Entry:
    """A cached block.

    Attributes:
        ttl_s: the longest TTL that the block ever had, in seconds.
        expires_at: when the block expires unless it is used before, in seconds on the ledger's
            clock.
        owner: the block's owner; see `owner_tags`.
        tiers: names of the tiers that hold the block.
        user: the only session that has used the block, as the owner of such a session's own
            blocks; `NOBODY` if there are several; None if none has yet.
    """

    ttl_s: int
    expires_at: float
    owner: bytes = NOBODY
    tiers: frozenset[str] = NOWHERE
    user: bytes | None = None

    @property
    def used_at(self) -> float:
        """When the block was used last, in seconds on the ledger's clock."""
        return self.expires_at - self.ttl_s


class Ledger:
    """The lifetimes of all blocks that this engine knows, whatever tier holds them.

    A lifetime belongs to a block's hash and not to one of its copies: a use on any tier refreshes
    the block on all tiers, and once the block has expired no tier may serve it. Every operation
    is O(1) per block: in each TTL class the order of last use is the order of expiry.

    Time is a parameter, in seconds. It may stand still and must not run backwards.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._by_ttl: dict[int, OrderedDict[bytes, Entry]] = {}
        # Keys by owner, by organisation: a purge costs what it finds, and not what there is.
        self._by_org: dict[bytes, dict[bytes, set[bytes]]] = {}
        self._resident: Counter[tuple[str, int]] = Counter()
        self._held: dict[str, Counter[bytes]] = {}
        self._orders: dict[str, tuple[LifetimeShare, Callable[[bytes], bytes]]] = {}
        # Sets of tiers are few, and entries many: all entries on the same tiers have the same set.
        self._tiers: dict[frozenset[str], frozenset[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def follow(
        self, tier: str, order: LifetimeShare, account_of: Callable[[bytes], bytes] = org_of
    ) -> None:
        """From here on keep the blocks that ``tier`` holds in ``order``, by their last use.

        Args:
            tier: the tier's name.
            order: the order.
            account_of: returns the account that blocks of an owner count towards.
        """
        self._orders[tier] = order, account_of

    def get(self, key: bytes) -> Entry | None:
        """Return the entry of ``key``, expired or not, or None."""
        return self._entries.get(key)

    def is_expired(self, key: bytes, now: float) -> bool:
        """Whether ``key`` is known and its lifetime is over. An unknown key is not expired."""
        entry = self._entries.get(key)
        return entry is not None and entry.expires_at <= now

    def touch(
        self,
        key: bytes,
        ttl_s: int,
        now: float,
        owner: bytes = NOBODY,
        user: bytes | None = None,
    ) -> bool:
        """Start or refresh the lifetime of ``key``; the longer of its old and new TTL counts.

        Call `pop_expired` first: touching an expired entry would revive it. Touch the blocks of a
        prompt from the last to the first, so that the end of a prefix is evicted first.

        Args:
            key: the block.
            ttl_s: its lifetime in seconds.
            now: the time.
            owner: whose it is, if it is new.
            user: for whose session, see `Entry.user`; None if that is not known, or told already.

        Returns:
            True if the key was not known before.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = Entry(ttl_s, now + ttl_s, owner, user=user)
            self._entries[key] = entry
            self._by_org.setdefault(org_of(owner), {}).setdefault(owner, set()).add(key)
            self._class(ttl_s)[key] = entry
            return True
        if user is not None and user is not entry.user and user != entry.user:
            entry.user = user if entry.user is None else NOBODY
        if ttl_s > entry.ttl_s:
            del self._by_ttl[entry.ttl_s][key]
            for tier in entry.tiers:
                self._resident[tier, entry.ttl_s] -= 1
                self._resident[tier, ttl_s] += 1
            entry.ttl_s = ttl_s
            self._class(ttl_s)[key] = entry
        else:
            self._by_ttl[entry.ttl_s].move_to_end(key)
        entry.expires_at = now + entry.ttl_s
        for tier, (order, account_of) in self._orders.items():
            if tier in entry.tiers:
                order.use(key, entry.ttl_s, now, account_of(entry.owner))
        return False

    def place(self, key: bytes, tier: str) -> None:
        """Note that ``tier`` holds a known key."""
        entry = self._entries[key]
        if tier not in entry.tiers:
            entry.tiers = self._same(entry.tiers | {tier})
            self._count(tier, entry, 1)
            if tier in self._orders:
                order, account_of = self._orders[tier]
                order.use(key, entry.ttl_s, entry.used_at, account_of(entry.owner))

    def displace(self, key: bytes, tier: str) -> None:
        """Note that ``tier`` no longer holds ``key``; drop the entry if no other tier does."""
        entry = self._entries.get(key)
        if entry is None or tier not in entry.tiers:
            return
        entry.tiers = self._same(entry.tiers - {tier})
        self._displaced(key, entry, tier)
        if not entry.tiers:
            self._drop(key, entry)

    def pop_expired(self, now: float) -> list[tuple[bytes, Entry]]:
        """Remove and return every entry whose lifetime is over."""
        expired: list[tuple[bytes, Entry]] = []
        for queue in self._by_ttl.values():
            while queue:
                key, entry = next(iter(queue.items()))
                if entry.expires_at > now:
                    break
                self._drop_everywhere(key, entry)
                expired.append((key, entry))
        return expired

    def owned(self, owner: bytes) -> list[bytes]:
        """Return the keys whose owner is ``owner`` as a whole."""
        return list(self._by_org.get(org_of(owner), {}).get(owner, ()))

    def purge(self, prefix: bytes) -> list[tuple[bytes, Entry]]:
        """Remove and return every entry whose owner begins with ``prefix``: nothing, an
        organisation's tag, or a whole owner."""
        if len(prefix) == len(NOBODY):
            keys = self._by_org.get(org_of(prefix), {}).get(prefix, set())
            purged = [(key, self._entries[key]) for key in keys]
        else:
            purged = [
                (key, self._entries[key])
                for org in ([prefix] if prefix else self._by_org)
                for keys in self._by_org.get(org, {}).values()
                for key in keys
            ]
        for key, entry in purged:
            self._drop_everywhere(key, entry)
        return purged

    def clear_tier(self, tier: str) -> list[tuple[bytes, Entry]]:
        """Note that ``tier`` was emptied; return each block that it held."""
        held = [(key, entry) for key, entry in self._entries.items() if tier in entry.tiers]
        for key, _ in held:
            self.displace(key, tier)
        return held

    def resident(self) -> Iterator[tuple[str, int, int]]:
        """Yield ``(tier, ttl_s, blocks)`` for every tier and TTL class there ever was. Those with
        no blocks are included, since a gauge that is not set keeps its last value."""
        for (tier, ttl_s), blocks in self._resident.items():
            yield tier, ttl_s, blocks

    def held(self, tier: str) -> dict[bytes, int]:
        """Return how many blocks of each organisation ``tier`` holds, by the organisation's
        tag."""
        return dict(self._held.get(tier, ()))

    def _same(self, tiers: frozenset[str]) -> frozenset[str]:
        return self._tiers.setdefault(tiers, tiers)

    def _count(self, tier: str, entry: Entry, blocks: int) -> None:
        self._resident[tier, entry.ttl_s] += blocks
        held, org = self._held.setdefault(tier, Counter()), org_of(entry.owner)
        held[org] += blocks
        if not held[org]:
            del held[org]

    def _class(self, ttl_s: int) -> OrderedDict[bytes, Entry]:
        return self._by_ttl.setdefault(ttl_s, OrderedDict())

    def _drop_everywhere(self, key: bytes, entry: Entry) -> None:
        for tier in entry.tiers:
            self._displaced(key, entry, tier)
        self._drop(key, entry)

    def _displaced(self, key: bytes, entry: Entry, tier: str) -> None:
        self._count(tier, entry, -1)
        if tier in self._orders:
            self._orders[tier][0].remove(key)

    def _drop(self, key: bytes, entry: Entry) -> None:
        del self._entries[key]
        del self._by_ttl[entry.ttl_s][key]
        org, owner = org_of(entry.owner), entry.owner
        self._by_org[org][owner].remove(key)
        if not self._by_org[org][owner]:
            del self._by_org[org][owner]
            if not self._by_org[org]:
                del self._by_org[org]
