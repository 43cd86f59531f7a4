"""An API server that outlives its engine can tell what went with it. vLLM's own server goes down
with its engine, so that here the API's side of breaks stands by itself; the engines are real."""

import os
import random
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import READERS

pytestmark = pytest.mark.engine

ACME = Caller("acme", "s")


class Conversation:
    """A conversation that goes on whatever happens to the engine."""

    def __init__(self) -> None:
        self._diagnoser = Diagnoser(b"a secret of tests", BLOCK, registry=CollectorRegistry())
        self._chance = random.Random(5)
        self._tokens: list[int] = []
        self._messages: list[dict] = []

    def turn(self, engine: Replica) -> Diagnosis:
        """Ask the next question; return why its history was not read."""
        self._tokens += draw_tokens(self._chance, 6 * BLOCK)
        if self._messages:
            self._messages.append({"role": "assistant", "content": "It is heavy."})
        self._messages.append({"role": "user", "content": "How heavy is it? " * 200})
        body = {"model": "m", "max_tokens": 1, "messages": self._messages}
        request = READERS[Protocol.MESSAGES](body, (300, 3600))
        pending = self._diagnoser.open(ACME, request, body, {})
        began = time.monotonic()
        (answer,) = engine.run(Ask(self._tokens, sealed(org_plan("acme", self._tokens))))
        length = len(self._tokens)
        timing = PromptTiming(list(self._tokens), length, length, began, time.monotonic())
        self._diagnoser.close(pending, [answer.report], None, [timing])
        return pending.diagnosis


@pytest.fixture
def conversation() -> Conversation:
    return Conversation()


@pytest.fixture
def start(tmp_path_factory) -> Iterator:
    started: list[Replica] = []

    def start(tiers: list[dict], **environment: str) -> Replica:
        before = dict(os.environ)
        os.environ |= environment
        model = build(MODELS / "tiny", TINY)
        started.append(Replica(model, tmp_path_factory.mktemp("replica"), {"tiers": tiers}))
        started[-1].ready()
        for name in environment.keys() - before.keys():
            del os.environ[name]
        return started[-1]

    yield start
    for replica in started:
        replica.stop()
    shm_regions.remove_stale()


def test_its_memory_went_with_the_engine(conversation: Conversation, start) -> None:
    old = start([])
    assert conversation.turn(old).cause == "first_request"
    old.stop()
    new = start([])
    seen = conversation.turn(new)
    assert (seen.cause, dict(seen.uncached)["engine_restarted"]) == ("engine_restarted", 6 * BLOCK)
    assert "outlives" in seen.suggestion
    assert conversation.turn(new).expected


def test_a_tier_outlives_the_engine_unless_it_hashes_differently(
    conversation: Conversation, start, tmp_path_factory
) -> None:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    waits = {"load_deadline": "2s", "timeout": "2s"}
    tier = {"type": "redis", "url": server.url, "encrypt": True, **waits}
    try:
        old = start([tier])
        conversation.turn(old)
        wait_until(lambda: len(entries(server)) == 6)
        old.stop()
        new = start([tier])
        assert conversation.turn(new).expected
        wait_until(lambda: len(entries(server)) == 12)
        new.stop()
        other = start([tier], PYTHONHASHSEED="7")
        seen = conversation.turn(other)
        assert (seen.cause, seen.engine[0].tokens) == ("hash_settings_differ", 12 * BLOCK)
        assert "PYTHONHASHSEED" in seen.suggestion
    finally:
        server.close()
