"""The blocks of sessions in a simulated cache: whose each is, as an engine's ledger knows it."""

from collections.abc import Iterable

_Owner = tuple[str, str]


class SessionBlocks:
    """Knows which resident blocks one session alone has used."""

    def __init__(self) -> None:
        # None for a block that several sessions have used.
        self._owner: dict[bytes, _Owner | None] = {}
        self._blocks: dict[_Owner, dict[bytes, None]] = {}

    def use(self, org: str, session: str, keys: Iterable[bytes]) -> None:
        """Note that a session of an organisation uses ``keys``."""
        owner = org, session
        own = self._blocks.setdefault(owner, {})
        for key in keys:
            before = self._owner.setdefault(key, owner)
            if before == owner:
                own[key] = None
            elif before is not None:
                self._blocks[before].pop(key, None)
                self._owner[key] = None
        if not own:
            del self._blocks[owner]

    def end(self, org: str, session: str) -> list[bytes]:
        """Return what only this session has used, which is over."""
        return list(self._blocks.get((org, session), ()))

    def forget(self, key: bytes) -> None:
        """Note that a block left the cache."""
        owner = self._owner.pop(key, None)
        if owner is not None and (own := self._blocks.get(owner)) is not None:
            own.pop(key, None)
            if not own:
                del self._blocks[owner]
