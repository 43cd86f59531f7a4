"""The purges of one engine: those that it is told of, and those that others have it carry out."""

from typing import Any

from cachetools import FIFOCache

from vllm_cachescope.connectors.vllm.engine.scheduler import CacheScopeConnectorScheduler
from vllm_cachescope.tiers.fleet_purges import Announcement
from vllm_cachescope.tiers.jobs import Purge
from vllm_cachescope.tiers.purge_notices import PurgeNotice

MAX_PURGES = 4096
"""How many purges can be asked about: the most recent ones."""

News = tuple[int, str, str | None, str | None]
"""A purge, for API processes: number, id, organisation and session (None for all)."""


class EnginePurges:
    """The purges that one engine carries out, on the scheduler's thread.

    Args:
        scheduler: our side in the scheduler.

    Attributes:
        has_news: whether the device or the CPU tier has lost entries to a purge; for whoever shows
            that to take back.
    """

    def __init__(self, scheduler: CacheScopeConnectorScheduler) -> None:
        self._scheduler = scheduler
        self._remotes = scheduler.remotes
        fleets = (remote.tier.fleet for remote in scheduler.remotes)
        self._fleets = [fleet for fleet in fleets if fleet is not None]
        self._purges: FIFOCache[str, dict[str, Purge]] = FIFOCache(MAX_PURGES)
        self._announcements: FIFOCache[str, list[Announcement]] = FIFOCache(MAX_PURGES)
        self._count = 0
        self._log: FIFOCache[int, tuple[str, str | None, str | None]] = FIFOCache(MAX_PURGES)
        self.has_news = False

    @property
    def is_late(self) -> bool:
        """Whether this engine is about to learn what others have purged long ago."""
        return any(fleet.is_late() for fleet in self._fleets)

    @property
    def has_errands(self) -> bool:
        """Whether others have purged what this engine has not yet."""
        return any(fleet.has_errands for fleet in self._fleets)

    def begin(
        self, prefix: bytes, purge_id: str, org: str | None, session: str | None
    ) -> dict[str, int]:
        """Purge all entries whose owner begins with ``prefix``; return how many the device and the
        CPU tier held. `outcome` tells of the remote tiers and of other engines, under ``purge_id``.
        """
        entries = self._purge(prefix, purge_id, org, session)
        notice = PurgeNotice(purge_id, prefix, org, session)
        self._announcements[purge_id] = [fleet.announce(notice) for fleet in self._fleets]
        self._purges[purge_id] = {one.name: one.tier.purge(prefix) for one in self._remotes}
        return entries

    def outcome(self, purge_id: str) -> dict[str, Any] | None:
        """Return what has become of a purge; None while it is under way.

        Returns:
            ``tiers``: for each remote tier how many entries were deleted there, and why some may
            be left (None if none are); ``confirmed``: the names of other engines that have carried
            it out; ``missing``: by the names of those that may not have, the reason.
        """
        if (purges := self._purges.get(purge_id)) is None:
            reason = "what became of the purge is not known any more; purge again"
            tiers = {remote.name: (0, reason) for remote in self._remotes}
            return {"tiers": tiers, "confirmed": [], "missing": {}}
        announcements = self._announcements.get(purge_id, [])
        are_over = [purge.over for purge in purges.values()]
        if not all([*are_over, *(one.over for one in announcements)]):
            return None
        return {
            "tiers": {name: (purge.entries, purge.reason) for name, purge in purges.items()},
            "confirmed": [name for one in announcements for name in one.confirmed],
            "missing": {name: why for one in announcements for name, why in one.missing.items()},
        }

    def heed(self, name: str, heard: int) -> list[News]:
        """Carry out what other engines have purged, and return what API processes are to forget:
        the purges later than number ``heard``, of those that can be asked about.

        Args:
            name: what an operator knows this engine's server by.
            heard: the number of the latest purge that the caller has heard of; 0 for none.
        """
        for fleet in self._fleets:
            fleet.name = name
        self.carry_out()
        if heard >= self._count:
            return []
        return [(number, *purge) for number, purge in self._log.items() if number > heard]

    def carry_out(self) -> bool:
        """Carry out what other engines have purged; return whether there was anything."""
        any_done = False
        for fleet in self._fleets:
            for errand in fleet.take():
                any_done = True
                notice = errand.notice
                self._purge(notice.prefix, notice.purge_id, notice.org, notice.session)
                remotes = [] if errand.at_home else self._remotes
                fleet.carried_out(errand, [one.tier.purge(notice.prefix) for one in remotes])
        return any_done

    def _purge(
        self, prefix: bytes, purge_id: str, org: str | None, session: str | None
    ) -> dict[str, int]:
        self._count += 1
        self._log[self._count] = purge_id, org, session
        entries = self._scheduler.purge(prefix)
        self.has_news |= any(entries.values())
        return entries
