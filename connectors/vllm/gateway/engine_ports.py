"""The engines' own ports, at which the gateway commands them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from vllm_cachescope.connectors.vllm.engine_command import PATH, sealed
from vllm_cachescope.connectors.vllm.engine_processes import ANSWER_S


class EnginePorts:
    """The engines behind one server, each at a port of its own. To be made on the event loop.

    Args:
        urls: the ports' addresses, by rank.
        secret: the engines' and the gateway's.
    """

    def __init__(self, urls: Sequence[str], secret: bytes) -> None:
        self._urls = [f"{url.rstrip('/')}{PATH}" for url in urls]
        self._secret = secret
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S))

    async def call(self, command: str, *args: Any) -> list[Any]:
        """Do a command in every engine; see `engine_rpc.call`.

        Raises:
            TimeoutError: if an engine does not answer, or refuses.
        """
        return await asyncio.gather(*(self._call(url, command, args) for url in self._urls))

    async def _call(self, url: str, command: str, args: Sequence[Any]) -> Any:
        try:
            body = sealed(command, list(args), self._secret)
            async with self._session.post(url, data=body, raise_for_status=True) as answer:
                return msgspec.msgpack.decode(await answer.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TimeoutError(f"{url}: {error}") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
