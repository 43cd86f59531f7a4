"""The interface of a store, which each backend of a remote tier implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm_cachescope.tiers.purge_log import PurgeLog


class StoreFailed(Exception):
    """The store did not answer, or not in time, or with nonsense. Its connection is gone."""


class StoreLate(StoreFailed):
    """The store did not answer in time. It may be slow, or had little time."""


class StoreUnfit(Exception):
    """The store answers, but the tier must not run on it; the message says what to do."""


class ForeignSecret(StoreUnfit):
    """Engines with another secret use the store: their blocks have other hashes."""


class Written(Enum):
    """The outcome for a value that was to be written."""

    STORED = "stored"
    PRESENT = "present"
    REFUSED = "refused"
    EXPIRED = "expired"


class Misfit(Enum):
    """Why what a store holds under a key cannot be a value of ours, whatever its header says."""

    LENGTH = "it has another length"
    TYPE = "it is no string"
    UNLIMITED = "the store would keep it for ever"
    UNLEASED = "its lease is damaged, or was not granted under this secret"
    OVERDUE = "the store keeps it past the end of its lease, or this engine's clock is ahead"
    UNREADABLE = "it does not load although it is there"


@dataclass(frozen=True, slots=True)
class Value:
    """A value to be written.

    Attributes:
        key: owner, block hash and group; see `keyspace.qualified`.
        head: the header; see `envelope`.
        payload: the block's bytes, or their ciphertext, in the memory they are in.
        expires_at: when it expires, on the tier's clock, in seconds.
    """

    key: bytes
    head: bytes
    payload: memoryview
    expires_at: float


class Store(ABC):
    """One thread's way to a store; connects anew when it must.

    No method is called from two threads at once. Deadlines are on the tier's clock, in seconds:
    a method returns or raises before its deadline, give or take one read of what has arrived.
    After `StoreFailed` the next call connects anew.
    """

    address: str
    """Where the store is, without its password."""

    refusal: str = ""
    """The store's words when it last refused a write."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether there is a connection, as far as can be told without asking the store."""

    @abstractmethod
    def connect(self, deadline: float) -> None:
        """Have a connection that answers.

        Raises:
            StoreFailed: if there is none to be had.
        """

    @abstractmethod
    def greet(self, deadline: float) -> dict[str, Any]:
        """Find out whether the tier may run on this store, and leave the digest of our secret for
        other engines to compare with theirs.

        Returns:
            What is known of the store: ``used_bytes``, ``capacity_bytes`` (0: no limit), and if it
            counts them ``orgs``: bytes by organisations' tags in hex; and where it can be told,
            in words, in what engines that have used it lately and share nothing with this one
            differ from it: ``strangers``.

        Raises:
            StoreFailed: if it does not answer.
            StoreUnfit: if it may not: another replica uses another secret, say.
        """

    @abstractmethod
    def secret_digests(self, deadline: float) -> set[bytes] | None:
        """Return the digests of the secrets of all engines that use the store, of whatever model
        (see `keyspace.secret_digest`); None where that cannot be told. Leaves nothing there: it is
        called on a store with a namespace of its own, instead of everything else.

        Raises:
            StoreFailed: if it does not answer.
            StoreUnfit: if no tier may run on it.
        """

    @abstractmethod
    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        """Return which of ``keys`` the store holds.

        Raises:
            StoreFailed: if it cannot be told.
        """

    @abstractmethod
    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | Misfit | None]:
        """Read values, each payload straight into its slot; yield their headers in order.

        A slot may be written to from when the iterator moves on to it until it moves on from it,
        and at no other time: several keys may have the same slot. What it holds is valid only once
        its header was yielded and checked.

        Args:
            keys: the keys.
            slots: where the payload of each goes.
            deadline: returns the deadline, which moves while values arrive. Asked for each value.

        Yields:
            The header; None where there is no such value (any more); a `Misfit` where what is
            there cannot be one, or must not be served any more.

        Raises:
            StoreFailed: if it stops answering; the slots not reached are then not touched again.
        """

    @abstractmethod
    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        """Write those of ``values`` that are not there already, and refresh the others.

        Raises:
            StoreFailed: if it stops answering; none of the payloads is read any more.
        """

    @abstractmethod
    def touch(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        """Let each key live until its time at least, if the store holds it.

        Args:
            keys: each with its time, on the tier's clock, in seconds.
            deadline: until when the answer is waited for.

        Raises:
            StoreFailed: if it does not answer.
        """

    @abstractmethod
    def drop(self, keys: Sequence[bytes], deadline: float) -> int:
        """Delete ``keys``; return how many were there.

        Raises:
            StoreFailed: if it does not answer.
        """

    @abstractmethod
    def purge(self, prefix: bytes, deadline: float) -> int:
        """Delete every entry of ours, of whatever model, whose key begins with ``prefix``, the
        beginning of an owner (see `owner_tags`); return how many there were. May take long. This
        engine writes no such entry meanwhile.

        Raises:
            StoreFailed: if it is not known that all are gone.
        """

    def take_expired(self) -> int:
        """Return how many expired entries this engine has deleted since the last time; 0 where the
        store itself does that."""
        return 0

    def take_damaged(self) -> int:
        """Return how many entries were damaged, half-written or without their other half, and
        deleted, without having been read, since the last time."""
        return 0

    def take_crowded(self) -> list[bytes]:
        """Return the keys that were deleted since the last time because the store was full; none
        where the store does not say."""
        return []

    def take_evicted(self) -> list[bytes]:
        """Return the keys that were deleted since the last time because their organisations held
        too much; none where the store does not count that."""
        return []

    def purge_log(self) -> PurgeLog | None:
        """Return the way to the purge log of all engines with our secret on this store; None where
        the store keeps none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""
