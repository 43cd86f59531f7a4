"""The engine processes behind one server, as its API side commands them."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.purges import PURGE_S

ANSWER_S = 10.0
"""How long an engine may take to answer a command, in seconds: longer than a long step."""

HEED_S = 0.5
"""How often an engine is asked what others have purged, in seconds."""

logger = logger_of(__name__)


class EngineProcesses(Engines):
    """The engine processes behind one server.

    Args:
        call: calls a command of the connector in every engine, with arguments; see `engine_rpc`.
        name: what an operator knows the server by.
        has_others: whether anyone else may purge: another API process, or another replica.
    """

    def __init__(
        self, call: Callable[..., Awaitable[list[Any]]], name: str, has_others: bool
    ) -> None:
        self._call_each = call
        self._name = name
        self._has_others = has_others
        self._forget: Callable[[str | None, str | None], object] = lambda org, session: None
        self._note_evictions: Callable[[Sequence[tuple[str, str, bytes, int]]], object] | None
        self._note_evictions = None
        # Ids of the purges of this process that it has not heard of yet.
        self._own_purges: set[str] = set()

    def on_purge(self, forget: Callable[[str | None, str | None], object]) -> None:
        self._forget = forget

    def on_evictions(self, note: Callable[[Sequence[tuple[str, str, bytes, int]]], object]) -> None:
        self._note_evictions = note

    async def sweep_every(self, interval_s: float) -> None:
        """Have the engines drop what has expired, also while they have nothing to do."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._call_each("sweep")
                if self._note_evictions is not None:
                    for counted in await self._call_each("evictions"):
                        self._note_evictions(counted)
            except Exception as error:
                # The engine may be busy going down; the server reports that itself.
                logger.debug("Sweep failed: %s", error)

    async def heed_every(self, interval_s: float) -> None:
        """Have the engines carry out what other replicas have purged, also while they have nothing
        to do, and forget here what others have purged."""
        heard = 0
        while self._has_others:
            await asyncio.sleep(interval_s)
            try:
                # Each purge goes to all engines: any of them knows of it.
                purges, *_ = await self._call_each("heed", self._name, heard)
            except Exception as error:
                logger.debug("Purges of others are not known: %s", error)
                continue
            for number, purge_id, org, session in purges:
                heard = number
                if purge_id in self._own_purges:
                    self._own_purges.remove(purge_id)
                else:
                    self._forget(org, session)

    async def health(self) -> list[list[dict[str, Any]]]:
        """Return the state of each tier of each engine process.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`.
        """
        return await self._call("health")

    async def end_session(self, owners: Sequence[bytes]) -> int:
        return sum([sum(await self._call("end_session", owner)) for owner in owners])

    async def tell_endings(self, endings: list[tuple[str, int]]) -> None:
        await self._call("endings", endings)

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        """Purge in each engine process; wait until the remote tiers are done as well.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`, or a remote tier is not
                done within twice `PURGE_S`.
        """
        purge_id = secrets.token_hex(8)
        if self._has_others:
            self._own_purges.add(purge_id)
        entries: Counter[str] = Counter()
        for local in await self._call("purge", prefix, purge_id, org, session):
            entries.update(local)
        purged = Purged()
        end = time.monotonic() + 2 * PURGE_S
        pause_s = 0.01
        while None in (answers := await self._call("purged", purge_id)):
            if time.monotonic() > end:
                raise TimeoutError("the purge does not end")
            await asyncio.sleep(pause_s)
            pause_s = min(0.5, 2 * pause_s)
        for answer in answers:
            for tier, (deleted, reason) in answer["tiers"].items():
                entries[tier] += deleted
                if reason is not None:
                    purged.unreached[tier] = reason
            purged.add(Purged({}, {}, set(answer["confirmed"]), answer["missing"]))
        purged.entries = dict(entries)
        return purged

    async def _call(self, command: str, *args: Any) -> list[Any]:
        return await asyncio.wait_for(self._call_each(command, *args), ANSWER_S)
