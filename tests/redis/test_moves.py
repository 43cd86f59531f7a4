"""Two servers on one Redis, as clients see them: a session that moves keeps its diagnosis, and its
next server says which one had it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.bodies import EPHEMERAL, agent_body, conversation, session
from tests.engine.server import OPERATOR_TOKEN, SMALL, Api, breaks, serve_scoped
from tests.redis.servers import RedisServer, entries, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@dataclass
class Fleet:
    """Two servers, and the Redis they share."""

    a: Api
    b: Api
    redis: RedisServer

    def notes(self) -> set[bytes]:
        """Return the names of the notes on sessions that the Redis holds."""
        client = self.redis.client
        names = client.keys("cachescope:sessions:*notes:*")
        return {note for name in names for note in client.hkeys(name)}


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Fleet]:
    model = build(MODELS / "tiny", TINY)
    with ExitStack() as stack:
        redis = RedisServer(tmp_path_factory.mktemp("redis"))
        stack.callback(redis.close)
        tier = {"type": "redis", "url": redis.url, "load_deadline": "2s", "timeout": "2s"}
        servers = []
        for name in "ab":
            ledger = {"directory": str(tmp_path_factory.mktemp(name) / "l"), "replica": f"r-{name}"}
            scratch = tmp_path_factory.mktemp(name)
            served = serve_scoped(model, scratch, *SMALL, tiers=[tier], ledger=ledger)
            servers.append(stack.enter_context(served))
        yield Fleet(*servers, redis)


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.redis.client.flushall()
    return running


def send(fleet: Fleet, api: Api, key: str, body: dict, noted: bool = True) -> dict:
    """Send a request, and wait until the other server can know of it."""
    before = fleet.notes()
    answer = api.post("/v1/messages", body, key, **session("s"))
    assert answer.status_code == 200, answer.text
    if noted:
        wait_until(lambda: fleet.notes() - before)
    return answer.json()


def test_the_next_server_names_the_one_that_had_it(fleet: Fleet) -> None:
    key = "key of a mover"
    usage = send(fleet, fleet.a, key, conversation("mover", 1, 250, cache_control=EPHEMERAL))
    tokens = usage["usage"]["cache_creation_input_tokens"]
    wait_until(lambda: len(entries(fleet.redis)) == tokens // 128)
    # What Redis has is read, and no loss.
    moved = conversation("mover", 2, 250, cache_control=EPHEMERAL)
    assert send(fleet, fleet.b, key, moved)["usage"]["cache_read_input_tokens"] == tokens
    assert breaks(fleet.b, key) == []
    # It moves once more, and Redis has lost what only the second server has.
    fleet.redis.client.delete(*entries(fleet.redis))
    send(fleet, fleet.a, key, conversation("mover", 3, 250, cache_control=EPHEMERAL))
    (seen,) = breaks(fleet.a, OPERATOR_TOKEN)
    assert (seen["cause"], seen["kind"]) == ("other_replica", "continuation")
    (miss,) = (one for one in seen["engine"] if one["cause"] == "other_replica")
    assert miss["detail"] == "it was on replica r-b, and redis had no copy of it"
    # The tenant learns that it was another one, and not which.
    (seen,) = breaks(fleet.a, key)
    assert "it was on another replica, and redis" in str(seen) and "r-b" not in str(seen)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_asks_hears_of_what_the_other_server_had(
    fleet: Fleet, streamed: bool
) -> None:
    key = f"key of an asker, streamed {streamed}"
    first = send(fleet, fleet.a, key, agent_body(key, diagnostics={"previous_message_id": None}))
    asked = {"previous_message_id": first["id"]}
    body = agent_body(key, "Weighs anything.", diagnostics=asked)
    client = fleet.b.anthropic(key)
    if streamed:
        with client.messages.stream(**body, extra_headers=session("s")) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**body, extra_headers=session("s"))
    assert message.diagnostics.cache_miss_reason.type == "tools_changed"
    wait_until(lambda: breaks(fleet.b, key))
    assert breaks(fleet.b, key)[0]["cause"] == "tools_changed"


def test_a_purge_on_one_server_deletes_what_the_other_one_noted(fleet: Fleet) -> None:
    key = "key of the purged"
    body = conversation("purged", 1, 250, cache_control=EPHEMERAL)
    send(fleet, fleet.a, key, body)
    answer = fleet.b.post("/cachescope/purge", {"session": "s"}, key)
    assert answer.status_code == 200, answer.text
    assert not fleet.notes()
    send(fleet, fleet.a, key, body)
    assert breaks(fleet.a, key) == []


def test_without_redis_requests_run_as_fast(fleet: Fleet) -> None:
    key = "key of the deserted"
    body = conversation("deserted", 1, 250, cache_control=EPHEMERAL)
    send(fleet, fleet.a, key, body)
    fleet.redis.stop()
    try:
        asked = body | {"diagnostics": {"previous_message_id": "msg_of_a"}}
        began = time.monotonic()
        for i in range(3):
            answer = fleet.b.post("/v1/messages", asked, key, **session(f"{i}"))
            assert answer.status_code == 200, answer.text
        assert time.monotonic() - began < 10
    finally:
        fleet.redis.resume()
