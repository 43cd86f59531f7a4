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


def assert_agrees(fleet, indexer):
    fleet.a.settle()
    wait_until(lambda: indexer.held() == fleet.a.resident)


def test_its_index_equals_what_the_engine_holds(fleet, indexer):
    chance = random.Random(1)
    prompts = {}
    for tenant in (None, "acme", "other"):
        prompts[tenant] = tokens = draw_tokens(chance, BLOCKS * BLOCK + 9)
        salt = f"dynamo-cache-salt:{tenant}" if tenant else ""
        fleet.a.run(Ask(tokens, None, 1, salt))
        assert_agrees(fleet, indexer)
    assert len(fleet.a.resident["CPU"]) == len(prompts) * BLOCKS
    for tenant, tokens in prompts.items():
        # A router asks by the tenant alone, and finds nothing of another one's.
        found = [indexer.matched(tokens, asked) for asked in (*prompts, "stranger")]
        assert found == [BLOCKS * BLOCK * (asked == tenant) for asked in (*prompts, "stranger")]
    for prefix in OWNERS.prefixes("salt:acme"):
        fleet.a.engine.call("command_purge", prefix, f"acme {prefix.hex()}")
    fleet.a.engine.call("command_sweep")
    assert_agrees(fleet, indexer)
    assert len(fleet.a.resident["CPU"]) == 2 * BLOCKS
    assert indexer.matched(prompts["acme"], "acme") == 0
    assert indexer.matched(prompts["other"], "other") == BLOCKS * BLOCK
