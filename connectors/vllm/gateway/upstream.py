"""The server behind the gateway: vLLM's Rust server, over HTTP."""

from collections.abc import Mapping
from typing import Any

import httpx

from vllm_cachescope.connectors.vllm.gateway.prefixes import CannotRender
from vllm_cachescope.wire.body import encode

_OF_CONNECTIONS = (b"connection", b"content-length", b"keep-alive", b"transfer-encoding")
_OF_REQUESTS = (*_OF_CONNECTIONS, b"accept-encoding", b"expect", b"host")
"""Headers that belong to one connection, or name what the gateway could not read."""

_CONNECT_S = 5.0
"""How long connecting to it may take, in seconds. An answer may take as long as it likes."""

_TIMEOUT = httpx.Timeout(None, connect=_CONNECT_S).as_dict()

_RENDERED = ("model", "messages", "tools", "chat_template_kwargs")
"""The fields of a body that it renders without running it."""


class Upstream:
    """The server.

    Args:
        url: its address.
    """

    def __init__(self, url: str) -> None:
        self._url = httpx.URL(url)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        self._client = httpx.AsyncClient(base_url=url, timeout=None, transport=self._transport)

    async def send(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> httpx.Response:
        """Return its answer to a request, whose body is still to be read.

        Args:
            method: of the request.
            path: its path, with its query.
            headers: its headers.
            body: its body.

        Raises:
            httpx.TransportError: if there is none.
        """
        kept = [(name, value) for name, value in headers if name.lower() not in _OF_REQUESTS]
        kept += [(b"host", self._url.netloc), (b"content-length", b"%d" % len(body))]
        url = self._url.copy_with(raw_path=path.encode("latin-1"))
        # Not by the client: cookies, redirects and the like take a third of a millisecond.
        request = httpx.Request(
            method, url, headers=kept, content=body, extensions={"timeout": _TIMEOUT}
        )
        return await self._transport.handle_async_request(request)

    async def model_name(self, headers: Mapping[str, str]) -> str:
        """Return the name of the model that it serves.

        Raises:
            httpx.HTTPError: if it does not say.
        """
        answer = await self._client.get("/v1/models", headers=headers)
        return str(answer.raise_for_status().json()["data"][0]["id"])

    async def tokens(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> list[int]:
        """Return the tokens of the prompt that it makes of a body of Chat Completions, without the
        opening of an answer.

        Raises:
            CannotRender: if it does not take the body.
        """
        rendered = {name: body[name] for name in _RENDERED if name in body}
        rendered["add_generation_prompt"] = False
        sent = {"content-type": "application/json", **headers}
        try:
            answer = await self._client.post("/tokenize", content=encode(rendered), headers=sent)
        except httpx.HTTPError as error:
            raise CannotRender(str(error)) from error
        if answer.status_code != httpx.codes.OK:
            raise CannotRender(answer.text)
        tokens: list[int] = answer.json()["tokens"]
        return tokens

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def replied_headers(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that are not its connection's."""
    return [
        (name, value) for name, value in response.headers.raw if name.lower() not in _OF_CONNECTIONS
    ]
