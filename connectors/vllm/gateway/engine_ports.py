"""The engines' own ports, at which the gateway commands them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from vllm_cachescope.connectors.vllm.engine_command import PATH, sealed
from vllm_cachescope.connectors.vllm.engine_processes import ANSWER_S


class EnginePorts:
    """The engines behind one server, each at a port of its own.

    Args:
        urls: the ports' addresses, by rank.
        secret: the engines' and the gateway's.
    """

    def __init__(self, urls: Sequence[str], secret: bytes) -> None:
        self._urls = [f"{url.rstrip('/')}{PATH}" for url in urls]
        self._secret = secret
        self._client = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False)

    async def call(self, command: str, *args: Any) -> list[Any]:
        """Do a command in every engine; see `engine_rpc.call`.

        Raises:
            TimeoutError: if an engine does not answer, or refuses.
        """
        return await asyncio.gather(*(self._call(url, command, args) for url in self._urls))

    async def _call(self, url: str, command: str, args: Sequence[Any]) -> Any:
        try:
            body = sealed(command, list(args), self._secret)
            answer = (await self._client.post(url, content=body)).raise_for_status()
        except httpx.HTTPError as error:
            raise TimeoutError(f"{url}: {error}") from error
        return msgspec.msgpack.decode(answer.content)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
