"""The engines behind an API server, as its operations need them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Purged:
    """The result of a purge.

    Attributes:
        entries: how many entries were deleted on each tier, over all engines: ``{"device": 12}``.
        unreached: the tiers that may still hold some, with the reason.
        confirmed: the names of other replicas that have purged as well.
        missing: by the names of those that may not have, the reason.
    """

    entries: dict[str, int] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Purged") -> None:
        """Add the result of another purge."""
        for tier, entries in other.entries.items():
            self.entries[tier] = self.entries.get(tier, 0) + entries
        self.unreached |= other.unreached
        self.missing |= other.missing
        # One of the engines of a replica may not have.
        self.confirmed = (self.confirmed | other.confirmed) - self.missing.keys()

    @property
    def is_whole(self) -> bool:
        """Whether it is known that all entries are gone."""
        return not self.unreached and not self.missing


class Engines(ABC):
    """All engines behind the server. The methods ask each of them, from the event loop."""

    @abstractmethod
    async def health(self) -> list[list[dict[str, Any]]]:
        """Return the state of each tier of each engine.

        Raises:
            TimeoutError: if an engine does not answer.
        """

    @abstractmethod
    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        """Purge on every tier the entries whose owner's tags begin with ``prefix``.

        Args:
            prefix: from `OwnerTags.prefix`; empty for all entries.
            org: the organisation that it is of; None for all.
            session: the session that it is of; None for all of the organisation's.

        Raises:
            TimeoutError: if an engine does not answer.
        """

    @abstractmethod
    async def end_session(self, owners: Sequence[bytes]) -> int:
        """Have the CPU tiers evict the blocks of a session first; return how many they have.

        Args:
            owners: the owners of its blocks, as `OwnerTags.prefixes` has them.

        Raises:
            TimeoutError: if an engine does not answer.
        """

    async def tell_endings(self, endings: list[tuple[str, int]]) -> None:  # noqa: B027
        """Tell how answers ended: ``(nonce, Ended)`` of each prompt. Where no policy wants to know
        there is nothing to do."""

    def on_evictions(  # noqa: B027
        self, note: Callable[[Sequence[tuple[str, str, bytes, int]]], object]
    ) -> None:
        """Have ``note`` called now and then with the evictions since the last time: tier, part
        (suffered, caused, own), tag of the organisation, entries. Where engines count none there is
        nothing to do."""

    def on_purge(self, forget: Callable[[str | None, str | None], object]) -> None:  # noqa: B027
        """Have ``forget`` called with the organisation and the session (None for all) of each
        purge that another API process of the server carries out, or another replica. Where
        there is none there is nothing to do."""
