"""The endings of answers: told to the engines, whose policy keeps what waits for a tool."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire.answer_end import waits_for_tools

TOLD_EVERY_S = 0.05
"""How long endings are collected for, in seconds: one call of the engines tells of all of them."""

MAX_WAITING = 4096
"""How many endings wait at most; further ones are not told."""

logger = logger_of(__name__)


def ending_of(data: bytes, is_responses: bool = False) -> Ended | None:
    """Return how an answer ended, from a reply's JSON or an event of it; None if it does not say,
    or was cut off.

    Args:
        data: the JSON, as the server wrote it.
        is_responses: whether it is of OpenAI's Responses, which name no reason.
    """
    waits = waits_for_tools(data, is_responses)
    if waits is None:
        return None
    return Ended.TOOLS if waits else Ended.ANSWER


class Endings:
    """Collects how answers ended, and tells the engines now and then. To be called on the event
    loop's thread.

    Args:
        tell: tells the engines: ``(nonce, Ended)`` of each prompt.
        tell_over: tells the engines of sessions that are over, by the owners of their blocks.
        tags: derives these owners.
    """

    def __init__(
        self,
        tell: Callable[[list[tuple[str, int]]], Awaitable[object]],
        tell_over: Callable[[Sequence[bytes]], Awaitable[object]],
        tags: OwnerTags,
    ) -> None:
        self._tell = tell
        self._tell_over = tell_over
        self._tags = tags
        self._waiting: list[tuple[str, int]] = []
        self._over: dict[bytes, None] = {}
        self._telling: asyncio.Task[None] | None = None

    def note(self, nonces: Iterable[str], ended: Ended) -> None:
        """Note how the answer to the prompts with these nonces ended."""
        room = MAX_WAITING - len(self._waiting)
        self._waiting += [(nonce, int(ended)) for nonce in nonces][: max(0, room)]
        self._tell_later()

    def end_session(self, caller: Caller) -> None:
        """Note that the session of ``caller`` is over."""
        if len(self._over) < MAX_WAITING and caller.session is not None:
            self._over |= dict.fromkeys(self._tags.prefixes(caller.org, caller.session))
            self._tell_later()

    def _tell_later(self) -> None:
        if (self._waiting or self._over) and self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell_soon())

    async def _tell_soon(self) -> None:
        await asyncio.sleep(TOLD_EVERY_S)
        told, self._waiting, self._telling = self._waiting, [], None
        over, self._over = list(self._over), {}
        try:
            if told:
                await self._tell(told)
            if over:
                await self._tell_over(over)
        except Exception as error:
            # The policy learns without it.
            logger.debug("Engines were not told how answers ended: %s", error)
