"""The contract between the tiers and the scheduler side."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.request import Request

from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.runs import RequestSignals
from vllm_cachescope.prompt.plan import Plan


@dataclass(frozen=True, slots=True)
class Ahead:
    """Among a request's state in the tiers: it stands for one that is yet to come, and uses nothing
    itself."""


class TierParent(ABC):
    """The scheduler side, as its tiers see it.

    The device tier gets its parent when it is made. vLLM makes the CPU tier's policy and the
    remote tiers before there is a parent; they get it by ``bind``, once, before the first request.

    Tiers call from within the methods that vLLM calls on them: on the scheduler's thread, or, from
    vLLM 0.33 on, on a thread that holds the offloading manager's lock. Never from threads of their
    own.

    Methods must not block, and take O(1) per key. None of them but `on_prefix_lookup` and
    `on_prefix_found` calls the tier back.

    A key is a block hash followed by the id of a group of layers, as vLLM's offloading makes it.
    """

    # For all tiers.

    @property
    @abstractmethod
    def ledger(self) -> Ledger:
        """The lifetimes of all blocks. The CPU tier's policy places its chunks in it, and displaces
        them; other tiers only read it."""

    @abstractmethod
    def now(self) -> float:
        """Return the time on the ledger's clock, in seconds; it never runs backwards."""

    # For the CPU tier and remote tiers.

    @abstractmethod
    def may_read(self, key: OffloadKey, context: ReqContext) -> bool:
        """Whether a request may find ``key`` on any tier: it has not expired, and was not purged
        while the request ran. Asked before each look-up."""

    @abstractmethod
    def may_store(self, key: OffloadKey, context: ReqContext) -> bool:
        """Whether a request may store ``key`` in the CPU tier: it was not purged while the request
        ran, and the prompt up to there does not exceed its organisation's quota by itself; storing
        it would evict the beginning of the very same prompt. Asked before each store."""

    @abstractmethod
    def ttl_and_owner(self, key: OffloadKey, context: ReqContext) -> tuple[int, bytes]:
        """Return the TTL in seconds and the owner that a request's plan gives to ``key``. A
        request that is over, its last blocks stored, has no plan: its keys are nobody's."""

    @abstractmethod
    def finished(self, context: ReqContext) -> tuple[list[bytes], RequestSignals, str]:
        """Return the keys of all blocks that a request used which is over, in prompt order, what
        it tells of their future, and the nonce under which the API side may yet tell how its answer
        ended; empty for none. No keys if the request is not known."""

    # For remote tiers.

    @abstractmethod
    def live_entry(self, key: bytes) -> Entry | None:
        """Return the ledger's entry of ``key``; None if it has expired or was purged, and must not
        be stored any more."""

    @abstractmethod
    def plan_of(self, request_id: str) -> Plan | None:
        """Return the plan of a request that runs; None if there is no such request."""

    @abstractmethod
    def quota_chunks(self, plan: Plan, end: int) -> int:
        """Return how many chunks of a prompt count towards the quota of the chunk that ends at
        ``end`` (tokens), up to that chunk and with it."""

    @abstractmethod
    def prefill_seconds(self, keys: Collection[bytes]) -> float:
        """Return how long the engine takes to compute what ``keys`` stand for, in seconds; 0
        while that is not known. A load may take that long and still be worth it."""

    @property
    @abstractmethod
    def short_step_s(self) -> float:
        """How long a step takes in which the engine computes few tokens, in seconds; 0 while that
        is not known."""

    # Events.

    @abstractmethod
    def on_prefix_lookup(self) -> None:
        """vLLM is about to look up a prompt in the prefix cache, which must hold nothing expired
        when this returns. Called by the device tier, which is called back."""

    @abstractmethod
    def on_prefix_found(self, request: Request, tokens: int) -> None:
        """The prefix cache holds the first ``tokens`` tokens of a prompt, and vLLM is about to
        allocate blocks for the rest. Called by the device tier, which is called back."""

    @abstractmethod
    def next_checkpoint(self, request: Request, tokens: int) -> int:
        """Return the first position behind ``tokens`` tokens of a prompt at which the engine should
        keep what a later prompt needs in order to go on from there; 0 for none. Called by the
        device tier."""

    @abstractmethod
    def on_prefix_cache_reset(self) -> None:
        """The prefix cache was emptied. Called by the device tier."""

    @abstractmethod
    def on_evicted(
        self, key: bytes, entry: Entry, reason: EvictionReason, by: bytes | None
    ) -> None:
        """The CPU tier evicted ``key``, and displaced it in the ledger, which may have ``entry``
        still, for the device. Expired and purged keys do not count: the scheduler side has them
        dropped itself. ``by`` is the tag of the organisation whose blocks needed the room, if that
        is known."""

    @abstractmethod
    def on_promoting(self, request_id: str, keys: Collection[bytes]) -> None:
        """A remote tier is about to load ``keys`` into the CPU tier for a request."""

    @abstractmethod
    def on_promoted(
        self, tier: str, request_id: str, loaded: Collection[tuple[bytes, int]]
    ) -> None:
        """A remote tier has loaded ``(key, ttl_s)`` into the CPU tier for a request, which may be
        over by now. Called before vLLM is told."""
