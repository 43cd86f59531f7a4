"""The jobs of a remote tier: loads, stores and purges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_cachescope.tiers.block_states import BlockState


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A block to be stored.

    Attributes:
        key: owner, block hash and group; see `keyspace.qualified`.
        slot: the block's bytes, which do not change until the job has finished.
        ttl_s: the block's TTL, in seconds.
        expires_at: when the block expires unless it is used, on the tier's clock, in seconds; see
            `expiry.expiry`.
    """

    key: bytes
    slot: memoryview
    ttl_s: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A load or a store that is over. From here on the tier does not touch the job's slots.

    Attributes:
        job_id: the job's number.
        complete: whether all of its keys were loaded or stored.
        loaded: the keys that were loaded, each with its TTL in seconds; empty for a store.
        request_id: the request that the keys were loaded for; None for a store.
        nbytes: bytes of payload moved.
        seconds: from the job's submission to its end.
    """

    job_id: int
    complete: bool
    loaded: tuple[tuple[bytes, int], ...]
    request_id: str | None
    nbytes: int
    seconds: float


@dataclass(slots=True, eq=False)
class LoadJob:
    """A load under way. Several threads take batches of its keys, in order.

    Attributes:
        job_id: the job's number.
        request_id: the request that the blocks are loaded for.
        keys: the blocks to load, in the order of the prompt.
        slots: where the payload of each key goes.
        started: when the job was submitted, on the tier's clock, in seconds.
        promised_until: until when the load may go on even if no block comes, on the same clock.
        deadline: until when the load may go on while blocks keep coming, on the same clock.
        failures: keys that were found and are not loaded, and why. The scheduler's thread reads
            this mapping meanwhile; see `Inquiry.failures`.
        taken: how many keys threads have taken on, or were dropped untaken.
        open: how many keys have no outcome yet.
        loaded: keys that are loaded, each with its TTL in seconds.
    """

    job_id: int
    request_id: str
    keys: Sequence[bytes]
    slots: Sequence[memoryview]
    started: float
    promised_until: float
    deadline: float
    failures: dict[bytes, BlockState]
    taken: int = 0
    open: int = field(init=False)
    loaded: list[tuple[bytes, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open = len(self)

    def __len__(self) -> int:
        return len(self.keys)

    def fail(self, failures: Mapping[bytes, BlockState]) -> None:
        """Note keys that are not loaded, and why."""
        self.failures.update(failures)


@dataclass(slots=True, eq=False)
class StoreJob:
    """A store under way. The thread that writes takes batches of its blocks, in order.

    Attributes:
        job_id: the job's number.
        blocks: the blocks to store, in the order of the prompt.
        started: when the job was submitted, on the tier's clock, in seconds.
        complete: whether all blocks that were submitted are stored, as far as is known.
        taken: how many blocks the thread has taken on.
        open: how many blocks have no outcome yet.
        nbytes: bytes of payload written.
    """

    job_id: int
    blocks: Sequence[Outgoing]
    started: float
    complete: bool
    taken: int = 0
    open: int = field(init=False)
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.open = len(self)

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(slots=True, eq=False)
class Purge:
    """A purge of entries, which a thread carries out.

    Attributes:
        prefix: what the keys of the entries begin with: nothing, an organisation's tag, an owner.
        batches: how many batches of stores had begun before it; see `StoreJobs.drop`.
        entries: how many entries were deleted.
        over: whether the purge is over. Other threads write ``entries`` and ``reason`` before they
            set this; nobody may read those two earlier.
        reason: why it is not known that all entries are gone; None if they are.
    """

    prefix: bytes
    batches: int = 0
    entries: int = 0
    over: bool = False
    reason: str | None = None

    def end(self, reason: str | None) -> None:
        """Note that the purge is over, and why some entries may be left."""
        self.reason = reason
        self.over = True
