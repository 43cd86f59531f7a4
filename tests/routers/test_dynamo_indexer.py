"""Dynamo's own indexer knows what an engine holds, on the device and in memory, and forgets it."""

import random
from collections.abc import Iterator

import pytest

from tests.engine.engine import BLOCK, OWNERS, Ask, draw_tokens
from tests.frontends.places import DYNAMO, needs
from tests.redis.servers import wait_until
from tests.routers.indexer import Indexer, running_indexer

pytestmark = [pytest.mark.engine, needs(DYNAMO)]

BLOCKS = 4


@pytest.fixture(scope="module")
def indexer(running) -> Iterator[Indexer]:
    with running_indexer() as indexer:
        indexer.register(running.a.events.config["endpoint"])
        # What is told before the indexer has connected is lost to it.
        for number in range(50):
            running.a.run(Ask([400 + number] * 200, None))
            if any(indexer.held().values()):
                break
        yield indexer


def test_its_index_equals_what_the_engine_holds(fleet, indexer):
    chance = random.Random(1)
    prompts = [draw_tokens(chance, BLOCKS * BLOCK + 9) for _ in range(3)]
    salts = ("", "dynamo-cache-salt:acme", "dynamo-cache-salt:other")
    fleet.a.run(*(Ask(tokens, None, 1, salt) for tokens in prompts for salt in salts))
    fleet.a.settle()
    wait_until(lambda: indexer.held() == fleet.a.resident)
    assert len(fleet.a.resident["CPU"]) == len(prompts) * len(salts) * BLOCKS
    for tokens in prompts:
        assert indexer.matched(tokens) == BLOCKS * BLOCK
        # A router asks by the tenant alone.
        assert indexer.matched(tokens, "acme") == BLOCKS * BLOCK
        assert indexer.matched(tokens, "stranger") == 0
    fleet.a.engine.call("empty_device")
    # One organisation's blocks leave both, the others' stay.
    for prefix in OWNERS.prefixes("salt:acme"):
        fleet.a.engine.call("command_purge", prefix, f"acme {prefix.hex()}")
    fleet.a.engine.call("command_sweep")
    fleet.a.run(Ask(draw_tokens(chance, 9), None, 1))
    fleet.a.settle()
    wait_until(lambda: indexer.held() == fleet.a.resident)
    assert indexer.matched(prompts[0], "acme") == 0
    assert indexer.matched(prompts[0], "other") == BLOCKS * BLOCK
