"""What Dynamo's indexer (1.6.1) loses whoever tells it: a block of a tenant that comes back."""

import pytest

from tests.engine.engine import BLOCK
from tests.frontends.places import DYNAMO, needs
from tests.redis.servers import wait_until
from tests.routers.dynamo import DynamoReader
from tests.routers.indexer import Indexer, running_indexer
from tests.routers.llmd import LlmdReader
from tests.routers.publisher import Event, publishing, removed, stored

pytestmark = [pytest.mark.engine, needs(DYNAMO)]

SALT = "dynamo-cache-salt:acme"
A, B, C, D = (10**15 + number for number in range(4))


def told(salt: str, removes: bool) -> list[Event]:
    """A prompt on the device; a block in front goes from memory; two behind it come there."""
    return [
        stored("GPU", A, B, salt=salt),
        stored("GPU", C, D, parent=B),
        *([removed("CPU", B)] if removes else []),
        stored("CPU", C, parent=B),
        stored("CPU", D, parent=C),
    ]


def known(indexer: Indexer, instance: int, events: list[Event]) -> dict[str, set[int]]:
    """Return what the program knows after the events."""
    with publishing() as publisher:
        indexer.register(publisher.endpoint, instance)
        for number in range(1, 100):
            # What is told before it has connected is lost.
            publisher.send([stored("GPU", number)])
            if indexer.held(instance)["GPU"]:
                break
        for event in events:
            publisher.send([event])
        publisher.send([stored("GPU", 1000)])
        wait_until(lambda: 1000 in indexer.held(instance)["GPU"])
        return indexer.held(instance)


def test_a_removal_from_one_tier_makes_it_forget_the_tenant_on_all() -> None:
    """The salt stands with a prompt's first block. The program remembers each block's tenant for
    those behind it, and forgets it when the block is removed, from whatever tier. What follows in
    that tier is then another tenant's to it, and of two blocks the second is lost."""
    with running_indexer() as indexer:
        for instance, (salt, removes, there) in enumerate(
            [(SALT, True, {C}), (SALT, False, {C, D}), ("", True, {C, D})], 1
        ):
            events = told(salt, removes)
            held = known(indexer, instance, events)
            assert held["CPU"] == there
            assert held["GPU"] >= {A, B, C, D}
            for reader in (LlmdReader(BLOCK), DynamoReader(BLOCK)):
                for event in events:
                    reader.read(event)
                assert reader.held("CPU") == {C, D}
