"""The store of notes on sessions, which replicas share: sealed, bounded for each account, and gone
when their time is over.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOTE_BYTES = 100
"""What the store takes for a note besides its bytes, about."""


@dataclass(frozen=True, slots=True)
class NoteBounds:
    """How many notes a store keeps.

    Attributes:
        sessions: sessions that an account has notes on; those that expire first go first.
        nbytes: bytes of an account's notes, `NOTE_BYTES` for each included.
        notes: notes on one session, the latest ones.
        session_bytes: bytes of the notes on one session.
    """

    sessions: int = 4096
    nbytes: int = 32 * 2**20
    notes: int = 32
    session_bytes: int = 2**20


BOUNDS = NoteBounds()


@dataclass(frozen=True, slots=True)
class NoteName:
    """Where the notes of a session stand. Each part is a digest under the secret.

    Attributes:
        account: who answers for the organisation.
        org: the organisation.
        session: the session of that organisation.
    """

    account: bytes
    org: bytes
    session: bytes


class NoteStore(ABC):
    """One thread's way to the notes. Deadlines are on the clock it was made with, in seconds.

    All methods but `alive` and `close` raise `StoreFailed` if the store does not answer, or
    refuses.
    """

    address: str
    """Where it is, without its password."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether there is a connection, as far as can be told without asking the store."""

    @abstractmethod
    def connect(self, deadline: float) -> None:
        """Have a connection that answers."""

    @abstractmethod
    def ahead_s(self, deadline: float) -> float:
        """Return how far the clock that replicas share is ahead of ours, in seconds."""

    @abstractmethod
    def read(self, name: NoteName, deadline: float) -> Mapping[bytes, bytes]:
        """Return the notes on a session, sealed, by their names."""

    @abstractmethod
    def write(
        self,
        name: NoteName,
        notes: Mapping[bytes, bytes],
        obsolete: Sequence[bytes],
        ttl_s: float,
        deadline: float,
    ) -> None:
        """Add notes on a session, and keep the bounds of its account.

        Args:
            name: the session.
            notes: the notes, sealed, by their names, which are in the order of their requests.
            obsolete: the names of notes to delete.
            ttl_s: how long the session's notes are kept at least, in seconds.
            deadline: until when an answer is waited for.
        """

    @abstractmethod
    def drop(self, name: NoteName, deadline: float) -> None:
        """Delete the notes on a session; where ``name.session`` is empty on all sessions of the
        organisation."""

    @abstractmethod
    def drop_all(self, deadline: float) -> None:
        """Delete all notes under our secret."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""
