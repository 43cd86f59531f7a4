"""The CPU tier's policy, which vLLM asks what to evict: the configured order, with the lifetimes,
quotas and reserves of the engine."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from cachetools import FIFOCache
from vllm.v1.kv_offload.base import (
    OffloadKey,
    ReqContext,
)
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.cache.learned_order import LONG_TTL_S, LearnedOrder, Piece
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.connectors.vllm.engine.pressure import writer_of
from vllm_cachescope.connectors.vllm.engine.tiers.base import Ahead, TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.copies import ON_DEVICE, ON_DEVICE_TTL_S, Copies
from vllm_cachescope.tenancy.owner_tags import NOBODY

CPU = "cpu"

MAX_UNTOLD = 4096
"""Of so many requests that are over it is still waited for how their answers ended."""


class ScopePolicy(CachePolicy):
    """Evicts in the configured order, with the lifetimes of its parent's ledger.

    vLLM makes the policy by its name in the configuration, so `bind` comes after. Expired chunks
    do not wait here to be evicted: `CpuTier.drop` removes them.
    """

    _parent: TierParent
    _ledger: Ledger

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._order: LifetimeShare | LearnedOrder = LifetimeShare()
        self._quotas: Quotas | None = None
        # TTL and owner of the keys that are about to be inserted.
        self._missed: dict[OffloadKey, tuple[int, bytes]] = {}
        # Accounts that may hold more than their quota.
        self._grown: set[bytes] = set()
        # The last key of each prompt whose answer may yet be told of, by the prompt's nonce.
        self._untold: FIFOCache[str, bytes] = FIFOCache(MAX_UNTOLD)
        # Keys that a promotion under way needs, and for how many prompts.
        self._held: Counter[bytes] = Counter()
        # Where a block takes room once, on the device or here; None where it may on both.
        self._copies: Copies | None = None

    def bind(
        self, parent: TierParent, quotas: Quotas | None, order: LifetimeShare | LearnedOrder
    ) -> None:
        """Connect the policy to the engine's lifetimes. To be called before the first chunk.

        Args:
            parent: the scheduler side.
            quotas: what each organisation may have of the tier; None for no limits.
            order: the order of eviction; empty.
        """
        self._parent, self._ledger = parent, parent.ledger
        self._quotas, self._order = quotas, order

    def keep_no_copies(self, on_device: Callable[[bytes], bool]) -> None:
        """From here on evict what the device holds as well before all else. To be called before the
        first chunk, where the order learns.

        Args:
            on_device: whether the device holds a block, or has just evicted it.
        """
        assert isinstance(self._order, LearnedOrder)
        self._copies = Copies(on_device, self._order)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # Called right before `insert`, which is not told for whom it inserts.
        self._missed = {key: self._parent.ttl_and_owner(key, req_context) for key in keys}

    def insert(
        self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None
    ) -> None:
        now = self._parent.now()
        self._chunks[key] = chunk
        if key not in self._ledger:
            ttl_s, owner = self._missed.get(key, (1, NOBODY))
            self._ledger.touch(key, ttl_s, now, owner)
        self._ledger.place(key, CPU)
        if self._copies is None or key not in self._copies.order.runs:
            self._use(key, now)

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        if self._copies is None:
            self._order.remove(key)
        else:
            self._copies.discard(key)
            self._copies.leave_order([key])
        self._ledger.displace(key, CPU)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        now = self._parent.now()
        for key in reversed(list(keys)):
            if key in self._chunks:
                self._use(key, now)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        if req_context.get_state(Ahead) is not None:
            return
        observed = order_request_keys(key_groups, req_context)
        if isinstance(self._order, LifetimeShare):
            self.touch(observed, req_context)
            return
        # vLLM has seen no use of those that the device held in front of what was loaded.
        used, signals, nonce = self._parent.finished(req_context)
        pieces = self._pieces(used or observed)
        self._order.use_request(pieces, self._parent.now(), signals)
        if nonce and pieces:
            self._untold[nonce] = pieces[-1][0][-1]

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        now, by = self._parent.now(), self._newcomer(protected)
        first: list[bytes] = []
        if self._copies is not None:
            first = self._copies.first_to_go(n, lambda key: self._must_stay(key, protected))
        # Prompts that run may have loaded some: those are in the order as well.
        taken = set(first)
        own = self._excess_with(protected, n - len(first), now, taken)
        taken |= own
        keys = self._order.victims(
            n - len(taken), now, lambda key: key in taken or self._must_stay(key, protected)
        )
        if keys is None:
            return None
        evicted = [
            (OffloadKey(key), self._chunks[OffloadKey(key)]) for key in (*first, *own, *keys)
        ]
        # Together, which is quicker; one by one they are then unknown to it.
        if self._copies is not None:
            self._copies.leave_order([key for key, _ in evicted])
        elif isinstance(self._order, LearnedOrder):
            self._order.remove_all(key for key, _ in evicted)
        for key, _ in evicted:
            self.drop(key, EvictionReason.QUOTA if key in own else EvictionReason.CAPACITY, by)
        return evicted

    def note_ending(self, nonce: str, ended: Ended) -> bool:
        """Note how the answer to a request that is over ended; return whether it is known here."""
        key = self._untold.pop(nonce, None)
        if key is not None and isinstance(self._order, LearnedOrder):
            self._order.tell(key, ended)
        return key is not None

    def retire(self, keys: Iterable[bytes]) -> int:
        """Evict ``keys`` first from here on; return how many of them are here."""
        keys = list(keys)
        here = [key for key in keys if key in self._chunks]
        if isinstance(self._order, LearnedOrder):
            # With what may come here from the device, where copies are not kept.
            self._order.retire(here if self._copies is None else keys)
        return len(here)

    def worth(self, key: OffloadKey, before: bytes | None) -> float:
        """Return the price of the blocks that begin with ``key``, which have left the tier, or
        left those up to ``before`` behind; 0 if nothing is known of them."""
        order = self._order
        return order.worth(key, before) if isinstance(order, LearnedOrder) else 0.0

    def next_victim_worth(self) -> float:
        """Return the price of what would be evicted next; endless if nothing may be."""
        if not isinstance(self._order, LearnedOrder):
            return inf
        now, order = self._parent.now(), self._order
        if self._copies is not None and self._copies.first_to_go(1, self._is_busy):
            return -inf
        victims = order.victims(1, now, self._is_busy)
        return inf if victims is None else order.price_of(victims[0])

    def came_to_device(self, key: bytes) -> None:
        """Note that the device holds ``key``: if it is here as well, this is a copy."""
        assert self._copies is not None
        if key in self._chunks:
            self._copies.note(key)

    def left_device(self, keys: Iterable[bytes]) -> None:
        """Note that the device does not hold ``keys`` any more, in prompt order: those that are
        here are no copies, and others are gone."""
        assert self._copies is not None
        stay: dict[tuple[bytes, bool], list[bytes]] = {}
        gone: list[bytes] = []
        for key in keys:
            self._copies.discard(key)
            entry = self._ledger.get(key)
            if key in self._chunks and entry is not None:
                place = self._account(entry), entry.ttl_s > LONG_TTL_S
                stay.setdefault(place, []).append(key)
            else:
                gone.append(key)
        self._copies.order.remove_all(gone)
        for (account, is_long), keys_of in stay.items():
            self._copies.order.reassign(keys_of, account, is_long)

    def worth_keeping(self, keys: Sequence[bytes], free: int) -> list[OffloadKey]:
        """Return those of ``keys``, which the device has just evicted, that earn more than what
        would leave for them, the best first; see `Copies.worth_keeping`."""
        assert self._copies is not None
        now = self._parent.now()
        kept = self._copies.worth_keeping(keys, free, now, self._is_busy, self._is_long)
        return [OffloadKey(key) for key in kept]

    def ready(self) -> list[OffloadKey]:
        """Return the keys that can be read now."""
        return [key for key, chunk in self._chunks.items() if chunk.is_ready]

    def hold(self, keys: Iterable[bytes]) -> None:
        """Evict none of ``keys``, here or to come, before `release` of the same keys."""
        self._held.update(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        """Allow what `hold` has forbidden."""
        for key in keys:
            self._held[key] -= 1
            if self._held[key] <= 0:
                del self._held[key]

    def fits_quotas(self, newcomers: Mapping[bytes, int]) -> bool:
        """Whether further keys can be held, so many of each owner, without an organisation's
        holding more than its quota. One that has none held may have what exceeds its quota by
        itself."""
        if self._quotas is None:
            return True
        quotas, held, more = self._quotas, Counter[bytes](), Counter[bytes]()
        for key in self._held:
            if (entry := self._ledger.get(key)) is not None:
                held[quotas.account_of(entry.owner)] += 1
        for owner, keys in newcomers.items():
            more[quotas.account_of(owner)] += keys
        return not any(
            held[account] and quotas.over(account, held[account] + keys)
            for account, keys in more.items()
        )

    def held_idle(self, also: Iterable[bytes] = ()) -> int:
        """Return how many chunks must stay although no transfer uses them: those held, and those
        of ``also``."""
        found = {key for key in also if key not in self._held}
        return sum(
            (chunk := self._chunks.get(OffloadKey(key))) is not None and chunk.ref_cnt == 0
            for key in (*self._held, *found)
        )

    def excess(self) -> list[bytes]:
        """Return the keys that organisations hold beyond their quotas, the oldest of each, without
        those in the middle of a transfer."""
        found: list[bytes] = []
        if self._quotas is None:
            return found
        for account in list(self._grown):
            if over := self._quotas.over(account, self._order.held(account)):
                found += self._order.victims_of(account, over, self._parent.now(), self._is_busy)
            else:
                self._grown.remove(account)
        return found

    def fullest(self) -> float | None:
        """Return the largest share of its quota that an account holds; None without quotas."""
        return None if self._quotas is None else self._quotas.fullest(self._order.accounts)

    def _excess_with(
        self, wanted: set[OffloadKey], most: int, now: float, taken: set[bytes]
    ) -> set[bytes]:
        """Return up to ``most`` keys, others than those ``taken``, that organisations will hold
        beyond their quotas once ``wanted`` are here. They are evicted first, so that an
        organisation makes room for its own chunks before others do."""
        found: set[bytes] = set()
        if self._quotas is None:
            return found
        quotas = self._quotas
        newcomers = Counter(
            quotas.account_of(self._owner(key)) for key in wanted if key not in self._chunks
        )
        for account, more in newcomers.items():
            over = quotas.over(account, self._order.held(account) + more)
            found.update(
                self._order.victims_of(
                    account,
                    min(over, most - len(found)),
                    now,
                    lambda key: key in taken or self._must_stay(key, wanted),
                )
            )
        return found

    def _newcomer(self, wanted: set[OffloadKey]) -> bytes | None:
        """Return the tag of the organisation that ``wanted`` come in for: they are one request's.
        None if they are here already."""
        for key in wanted:
            if key not in self._chunks:
                return writer_of(self._owner(key))
        return None

    def _must_stay(self, key: bytes, protected: set[OffloadKey]) -> bool:
        return key in protected or self._is_busy(key)

    def _is_busy(self, key: bytes) -> bool:
        """Whether a key may not be evicted: it is held, in the middle of a transfer, or here only
        in the order, for the device."""
        chunk = self._chunks.get(OffloadKey(key))
        return chunk is None or chunk.ref_cnt != 0 or key in self._held

    def _is_long(self, key: bytes) -> bool:
        entry = self._ledger.get(key)
        return entry is not None and entry.ttl_s > LONG_TTL_S

    def _owner(self, key: OffloadKey) -> bytes:
        entry = self._ledger.get(key)
        return entry.owner if entry else self._missed.get(key, (1, NOBODY))[1]

    def clear(self) -> None:
        for key in list(self._chunks):
            self.drop(key, EvictionReason.RESET)

    def drop(self, key: OffloadKey, reason: EvictionReason, by: bytes | None = None) -> None:
        """Remove ``key``, and tell the parent why, and for which organisation."""
        entry = self._ledger.get(key)
        self.remove(key)
        if entry is not None:
            self._parent.on_evicted(key, entry, reason, by)

    def _use(self, key: OffloadKey, now: float) -> None:
        entry = self._ledger.get(key)
        if entry is None:
            return
        if self._copies is not None and self._copies.on_device(key):
            self._copies.note(key)
            self._order.use(key, ON_DEVICE_TTL_S, now, ON_DEVICE)
        else:
            self._order.use(key, entry.ttl_s, now, self._account(entry))

    def _pieces(self, keys: Iterable[bytes]) -> list[Piece]:
        """Return those of a prompt's keys that the order is to have, divided by TTL and account:
        those that are here, and where copies are not kept those of the device."""
        pieces: list[Piece] = []
        piece: list[bytes] = []
        last: tuple[int, bytes] | None = None
        for key in keys:
            entry = self._ledger.get(key)
            if entry is None:
                continue
            if self._copies is not None and self._copies.on_device(key):
                place = ON_DEVICE_TTL_S, ON_DEVICE
                if key in self._chunks:
                    self._copies.note(key)
            elif key in self._chunks:
                place = entry.ttl_s, self._account(entry)
            else:
                continue
            if place != last:
                piece, last = [], place
                pieces.append((piece, *place))
            piece.append(key)
        return pieces

    def _account(self, entry: Entry) -> bytes:
        """Return the account that a chunk counts towards, which may have grown over its quota."""
        if self._quotas is None:
            return b""
        account = self._quotas.account_of(entry.owner)
        self._grown.add(account)
        return account
