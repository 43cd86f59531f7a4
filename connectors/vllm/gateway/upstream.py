"""The server behind the gateway: vLLM's Rust server, over HTTP."""

from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from vllm_cachescope.connectors.vllm.gateway.prefixes import CannotRender, rendered_fields
from vllm_cachescope.wire.body import decode, encode

_OF_CONNECTIONS = (b"connection", b"content-length", b"keep-alive", b"transfer-encoding")
_OF_REQUESTS = (*_OF_CONNECTIONS, b"accept-encoding", b"expect", b"host")
"""Headers that belong to one connection, or name what the gateway could not read."""

_NOT_ADDED = ("accept", "accept-encoding", "content-type", "user-agent")
"""Headers that the client library would make up where a request has none."""

_CONNECT_S = 5.0
"""How long connecting to it may take, in seconds. An answer may take as long as it likes."""

Response = aiohttp.ClientResponse


class Upstream:
    """The server. To be made on the event loop.

    Args:
        url: its address.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NOT_ADDED,
            auto_decompress=False,
        )

    async def send(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Response:
        """Return its answer to a request, whose body is still to be read.

        Args:
            method: of the request.
            path: its path, with its query.
            headers: its headers.
            body: its body.

        Raises:
            aiohttp.ClientConnectionError: if there is none.
        """
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name.lower() not in _OF_REQUESTS
        ]
        url = URL(self._url + path, encoded=True)
        return await self._session.request(
            method, url, headers=kept, data=body, allow_redirects=False
        )

    async def model_name(self, headers: Mapping[str, str]) -> str:
        """Return the name of the model that it serves.

        Raises:
            aiohttp.ClientError: if it does not say.
        """
        url = f"{self._url}/v1/models"
        async with self._session.get(url, headers=headers, raise_for_status=True) as answer:
            return str((await answer.json())["data"][0]["id"])

    async def tokens(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> list[int]:
        """Return the tokens of the prompt that it makes of a body of Chat Completions, without the
        opening of an answer.

        Raises:
            CannotRender: if it does not take the body.
        """
        rendered = {**rendered_fields(body), "add_generation_prompt": False}
        sent = {"content-type": "application/json", **headers}
        url = f"{self._url}/tokenize"
        try:
            async with self._session.post(url, data=encode(rendered), headers=sent) as answer:
                raw = await answer.read()
        except aiohttp.ClientError as error:
            raise CannotRender(str(error)) from error
        if not answer.ok:
            raise CannotRender(raw.decode(errors="replace"))
        tokens: list[int] = decode(raw)["tokens"]
        return tokens

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def replied_headers(response: Response) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that are not its connection's."""
    return [
        (name.lower(), value)
        for name, value in response.raw_headers
        if name.lower() not in _OF_CONNECTIONS
    ]
