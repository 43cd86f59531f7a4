"""The base of the policies that know nothing but keys."""

from abc import ABC, abstractmethod


class Peer(ABC):
    """A cache of keys that are all of one size.

    Args:
        capacity: how many it holds, at least 1.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def __contains__(self, key: bytes) -> bool:
        """Whether ``key`` is there."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many keys are there."""

    @abstractmethod
    def access(self, key: bytes, now: float) -> None:
        """Use ``key`` at ``now`` (seconds), and add it if it is not there, unless the policy
        refuses."""

    def expire(self, now: float) -> None:
        """Drop what may not be read any more at ``now``."""
        del now
