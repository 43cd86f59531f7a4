"""The breaks of all replicas of one ledger, over HTTP, and who may know which replica had them."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from tests.redis import test_moved_requests
from tests.redis.test_moved_requests import SECRET, asking
from vllm_cachescope.api.services import Server
from vllm_cachescope.config import load

TOKEN = "the operator's own token"


class Replica(test_moved_requests.Replica):
    """A server on a ledger that others write, too."""

    def __init__(self, name: str, ledger: Path, shows_replicas: bool) -> None:
        self._config = {
            "secret": SECRET,
            "operator_token": TOKEN,
            "ledger": {"url": f"sqlite:///{ledger}"},
            "page": True,
            "show_replicas": shows_replicas,
        }
        super().__init__("", name, 0.0)

    def connect(self, state: Any) -> Server:
        config, engines = load(self._config), test_moved_requests.Nothing()
        return Server(
            config, "m", 16, (), engines, lambda *_: None, self.registry, replica=self.name
        )

    async def get(self, path: str, key: str, query: str = "") -> tuple[int, Any]:
        """Return the status and the body of what a caller with a key is answered."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode()}
        scope |= {"headers": [(b"x-api-key", key.encode())], "app": self}
        await self(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(body)


@pytest.mark.parametrize("shows_replicas", [False, True])
async def test_breaks_are_listed_by_each_replica(tmp_path, shows_replicas):
    ledger = tmp_path / "ledger.db"
    replicas = [Replica(name, ledger, shows_replicas) for name in ("a", "b", "c")]
    for number, replica in enumerate(replicas):
        for tool in ("Weighs things.", "Weighs anything."):
            await replica.post(asking("x", None, tool=tool), session=f"s{number}")
        await replica.causes(1)
    for replica in replicas:
        others = sorted({"a", "b", "c"} - {replica.name})

        async def listed(key: str, at: Replica = replica) -> list[dict[str, Any]]:
            status, answer = await at.get("/cachescope/breaks", key)
            assert status == 200
            return list(answer["breaks"])

        found = await listed(TOKEN)
        while len(found) < 3:
            found = await listed(TOKEN)
        assert [one["at"] for one in found] == sorted((one["at"] for one in found), reverse=True)
        assert {one["cause"] for one in found} == {"tools_changed"}
        assert sorted(one["session"] for one in found) == ["s0", "s1", "s2"]
        assert sorted(one["replica"] for one in found if "replica" in one) == others
        # A tenant sees its own breaks, wherever they were, and nobody else's.
        own = [one.get("replica") for one in await listed("key")]
        names = others if shows_replicas else ["another replica"] * 2
        assert sorted(filter(None, own)) == names and len(own) == 3
        assert await listed("another key") == []
        # The same holds for usage, and for the page.
        assert (await replica.get("/cachescope/usage", TOKEN, "by=replica"))[0] == 200
        status, _ = await replica.get("/cachescope/usage", "key", "by=replica")
        assert status == (200 if shows_replicas else 403)
        assert (await replica.get("/cachescope/usage", "key", "by=session"))[0] == 200
        for key, named in ((TOKEN, True), ("key", shows_replicas)):
            answer = {"requests": []}
            # They are there once the ledgers' threads have written them.
            while len(answer["requests"]) < 6:
                status, answer = await replica.get("/cachescope/requests", key)
                assert status == 200
            assert len(answer["requests"]) == 6
            assert {one.get("replica") for one in answer["requests"]} == (
                {"a", "b", "c"} if named else {None}
            )
