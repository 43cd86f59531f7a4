"""Why tokens were not read that another engine behind the same API server had, or a tier that both
share: each cause brought about for real, and named in the list of breaks and in the metrics."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.bodies import EPHEMERAL, conversation
from tests.engine.engine import BLOCK_BYTES
from tests.engine.server import SMALL, Api, breaks, named, serve_scoped
from tests.redis.servers import RedisServer, entries, wait_until

pytestmark = pytest.mark.engine


@dataclass
class Deployment:
    """An API server, two engines with little room behind it, and the Redis they share."""

    api: Api
    server: RedisServer

    def send(self, key: str, body: dict, engine: int = 0) -> dict:
        """Send a request to one of the engines; return the usage."""
        headers = {"x-data-parallel-rank": str(engine), "x-cachescope-session": "s"}
        answer = self.api.post("/v1/messages", body, key, **headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]

    def ask(self, name: str, turns: int = 1, engine: int = 0) -> dict:
        """Send the conversation of an organisation with that name."""
        body = conversation(name, turns, 250, cache_control=EPHEMERAL)
        return self.send(f"key of {name}", body, engine)

    def lost(self, name: str, turns: int = 1, engine: int = 0) -> dict:
        """Do `ask`; return the break that it makes."""
        return named(self.api, f"key of {name}", lambda: self.ask(name, turns, engine))

    def shared(self, name: str) -> int:
        """Do `ask` of the first engine, until it is stored; return how many tokens that are."""
        before = len(self.names())
        tokens = self.ask(name)["cache_creation_input_tokens"]
        wait_until(lambda: len(self.names()) == before + tokens // 128)
        return tokens

    def names(self) -> list[bytes]:
        return list(entries(self.server))

    def crowd_out(self, name: str) -> None:
        """Have others use the first engine's memory until nothing else is left in it."""
        for i in range(8):
            self.ask(f"{name}'s neighbour {i}")

    def recover(self) -> None:
        """Empty the server, and wait until both engines use it."""
        client = self.server.client
        client.config_set("maxmemory", 0)
        client.flushall()

        def used() -> bool:
            self.tries += 1
            name = f"probe {self.tries}"
            self.ask(name)
            return self.ask(name, engine=1)["cache_read_input_tokens"] > 0

        wait_until(used, 60)

    tries: int = 0


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Deployment]:
    model = build(MODELS / "tiny", TINY)
    scratch = tmp_path_factory.mktemp("redis")
    server = RedisServer(scratch)
    tier = {
        "type": "redis",
        "url": server.url,
        "load_deadline": "2s",
        "timeout": "2s",
        "first_probe": "50ms",
        "longest_probe": "200ms",
    }
    options = (*SMALL, "--data-parallel-size", "2")
    config = {"cpu_bytes": 24 * BLOCK_BYTES, "tiers": [tier]}
    try:
        with serve_scoped(model, scratch, *options, **config) as api:
            yield Deployment(api, server)
    finally:
        server.close()


@pytest.fixture
def deployment(running: Deployment) -> Deployment:
    running.recover()
    return running


def test_what_the_other_engine_stored_is_no_loss(deployment: Deployment) -> None:
    tokens = deployment.shared("lucky")
    usage = deployment.ask("lucky", 2, engine=1)
    assert usage["cache_read_input_tokens"] == tokens
    assert breaks(deployment.api, "key of lucky") == []


def test_the_other_engine_has_it_and_the_tier_has_not(deployment: Deployment) -> None:
    tokens = deployment.shared("unlucky")
    deployment.server.client.flushall()
    seen = deployment.lost("unlucky", 2, engine=1)
    assert (seen["cause"], seen["uncached"]["other_replica"]) == ("other_replica", tokens)
    assert seen["engine"][0]["detail"] == "it was on engine 0, and redis had no copy of it"


def test_the_tier_is_dead(deployment: Deployment) -> None:
    tokens = deployment.shared("bereft")
    deployment.shared("bereaved")
    deployment.crowd_out("bereaved")
    deployment.server.kill()
    # For the second engine, which cannot ask what there is, and for the first, which knows.
    for name, engine in (("bereft", 1), ("bereaved", 0)):
        seen = deployment.lost(name, 2, engine)
        assert (seen["cause"], seen["uncached"][seen["cause"]]) == ("tier_unavailable", tokens)
        assert seen["engine"][0]["tier"] == "redis"
    deployment.server.start()


def test_the_tier_is_late(deployment: Deployment) -> None:
    deployment.shared("patient")
    deployment.server.stop()
    seen = deployment.lost("patient", 2, engine=1)
    deployment.server.resume()
    assert (seen["cause"], seen["engine"][0]["tier"]) == ("timed_out", "redis")
    assert "deadline" in seen["suggestion"]


def test_the_tier_gave_it_up(deployment: Deployment) -> None:
    deployment.shared("forgotten")
    deployment.crowd_out("forgotten")
    deployment.server.client.flushall()
    seen = deployment.lost("forgotten", 2)
    assert (seen["cause"], seen["engine"][0]["tier"]) == ("evicted", "redis")


def test_the_tier_was_full(deployment: Deployment) -> None:
    deployment.server.client.config_set("maxmemory-policy", "noeviction")
    deployment.server.client.config_set("maxmemory", 1)
    deployment.ask("refused")
    deployment.crowd_out("refused")
    seen = deployment.lost("refused", 2)
    assert (seen["cause"], seen["engine"][0]["tier"]) == ("never_stored", "redis")
    assert seen["engine"][0]["detail"] == "the tier refused it"


def test_engines_with_another_secret_use_the_tier(deployment: Deployment) -> None:
    deployment.shared("estranged")
    client = deployment.server.client
    handshake = b":".join([*deployment.names()[0].split(b":")[:3], b"secret"])
    client.set(handshake, "the digest of another secret")
    # Whoever loses the server shakes hands with it again.
    deployment.server.stop()
    for i in range(4):
        deployment.ask("estranged from the server", 1 + i // 2, engine=i % 2)
    deployment.server.resume()
    wait_until(lambda: len(client.client_list()) > 1)
    try:
        wait_until(lambda: deployment.ask("estranged", 2, engine=1) and said(deployment))
    finally:
        client.delete(handshake)


def said(deployment: Deployment) -> bool:
    seen, *_ = breaks(deployment.api, "key of estranged")
    return seen["cause"] == "hash_settings_differ"
