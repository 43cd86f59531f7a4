"""Engines that share a Redis and differ in what a block's bytes depend on."""

import random
from collections.abc import Iterator

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, draw_tokens
from tests.redis.pair import ask
from tests.redis.replica import Replica
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.connectors.vllm import shm_regions

pytestmark = pytest.mark.engine

OTHERS = {
    "itself": {},
    "another type of numbers": {"dtype": "bfloat16"},
    "blocks of another size": {"block_size": BLOCK // 2, "num_gpu_blocks_override": 128},
    "another model": {},
}


@pytest.fixture
def start(tmp_path) -> Iterator:
    started: list[Replica] = []

    def start(name: str, url: str) -> Replica:
        directory = MODELS / "tiny"
        if name == "another model":
            # Equal in all but the weights, at another seed.
            directory = tmp_path / "model"
            build(directory, TINY, seed=1)
        scratch = tmp_path / f"replica {len(started)}"
        scratch.mkdir()
        tier = {"type": "redis", "url": url, "load_deadline": "2s", "timeout": "2s"}
        started.append(Replica(directory, scratch, {"tiers": [tier]}, **OTHERS[name]))
        return started[-1]

    build(MODELS / "tiny", TINY)
    yield start
    for replica in started:
        replica.stop()
    shm_regions.remove_stale()


def test_only_an_engine_of_the_same_kind_finds_anything(start, tmp_path):
    server = RedisServer(tmp_path)
    try:
        first = start("itself", server.url)
        engines = {name: start(name, server.url) for name in OTHERS}
        tokens = draw_tokens(random.Random(1), 6 * BLOCK + 7)
        first.run(ask(tokens))
        wait_until(lambda: len(entries(server)) == 6)
        # The answers that count are each engine's own.
        for name, engine in engines.items():
            expected = engine.call("uncached", tokens)
            (answer,) = engine.run(ask(tokens))
            assert answer.tokens == expected, name
            assert answer.read == (6 * BLOCK if name == "itself" else 0), name
    finally:
        server.close()
