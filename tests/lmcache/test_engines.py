"""Engines with tiers of several kinds: each hit has its source, and every answer is exact."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import REDIS_SERVER, RedisServer, wait_until
from vllm_cachescope.connectors.vllm import regions

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(REDIS_SERVER is None, reason="needs redis-server"),
]

PATIENT = {"load_deadline": "3s", "timeout": "3s", "first_probe": "50ms", "longest_probe": "200ms"}
"""Two engines compute on the same cores as their servers: what is late is not what is tested."""


@dataclass
class Cluster:
    """Two engines, one after the other, and what is behind them.

    Attributes:
        near: the Redis of the tier ``redis``.
        resp: the Redis behind the tier ``resp``.
        files: the directory of the tier ``files``.
        first: an engine with all three, each with limits of its own.
        second: one with ``files`` and ``resp``.
    """

    near: RedisServer
    resp: RedisServer
    files: Path
    first: Replica
    second: Replica

    def stored(self, blocks: int) -> None:
        """Wait until the first engine's tiers hold so many blocks."""
        wait_until(lambda: len(self.blocks_near()) == len(self.in_files()) == blocks)

    def blocks_near(self) -> set[bytes]:
        """Return the names of the blocks in the near Redis."""
        return set(self.near.client.keys("*00000000"))

    def behind_resp(self) -> set[bytes]:
        """Return the names of the values behind the RESP adapter."""
        return set(self.resp.client.keys("*0000000076@*"))

    def in_files(self) -> set[Path]:
        """Return the values in the file system."""
        return set(self.files.glob("*0000000076@*.data"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    model = build(MODELS / "tiny", TINY)
    scratch = tmp_path_factory.mktemp("lmcache")
    near, resp = RedisServer(scratch), RedisServer(scratch)
    files = scratch / "files"
    redis_tier = {"type": "redis", "url": near.url, **PATIENT}
    files_tier = {
        "type": "lmcache",
        "name": "files",
        "adapter": {"type": "fs", "base_path": str(files)},
        **PATIENT,
        "connections": 1,
        "max_inflight_bytes": "8MiB",
    }
    resp_tier = {
        "type": "lmcache",
        "name": "resp",
        "adapter": {"type": "resp", "host": "127.0.0.1", "port": resp.port, "num_workers": 2},
        **PATIENT,
    }

    def start(*tiers: dict[str, object]) -> Replica:
        return Replica(model, tmp_path_factory.mktemp("engine"), {"tiers": list(tiers)})

    cluster = Cluster(
        near, resp, files, start(redis_tier, files_tier, resp_tier), start(files_tier, resp_tier)
    )
    cluster.first.ready()
    cluster.second.ready()
    yield cluster
    cluster.first.stop()
    cluster.second.stop()
    regions.remove_stale()
    near.close()
    resp.close()


def ask(tokens: list[int], org: str = "acme") -> Ask:
    return Ask(tokens, sealed(org_plan(org, tokens)))


def test_one_prompt_is_read_from_memory_redis_and_files(cluster: Cluster):
    tokens = draw_tokens(random.Random(1), 12 * BLOCK + 7)
    first = cluster.first
    first.run(ask(tokens[: 8 * BLOCK + 1]))
    cluster.stored(8)
    near = cluster.blocks_near()
    (answer,) = first.run(ask(tokens))
    cluster.stored(12)
    expected = answer.tokens
    # The last third is only in the files, the middle one there and in Redis.
    cluster.near.client.delete(*(cluster.blocks_near() - near))
    first.call("empty")
    first.run(ask(tokens[: 4 * BLOCK + 1]))
    first.call("empty_device")
    (answer,) = first.run(ask(tokens))
    assert answer.outcome("read_cpu") == 4 * BLOCK
    assert answer.outcome("read_redis") == 4 * BLOCK
    assert answer.outcome("read_files") == 4 * BLOCK
    assert answer.outcome("uncached") == 7
    assert answer.tokens == expected == first.call("uncached", tokens)
    # From there they have come into memory.
    first.call("empty_device")
    (answer,) = first.run(ask(tokens))
    assert answer.outcome("read_cpu") == 12 * BLOCK
    assert answer.tokens == expected


def test_a_new_process_reads_what_an_old_one_left(cluster: Cluster):
    """First in files, then, without those, behind the RESP adapter."""
    tokens = draw_tokens(random.Random(2), 10 * BLOCK + 7)
    there = len(cluster.in_files())
    (answer,) = cluster.first.run(ask(tokens))
    wait_until(lambda: len(cluster.in_files()) == there + 10)
    wait_until(lambda: len(cluster.behind_resp()) >= 10)
    expected = answer.tokens
    cluster.first.stop()
    (answer,) = cluster.second.run(ask(tokens))
    assert answer.outcome("read_files") == 10 * BLOCK
    assert answer.tokens == expected
    # Another organisation reads none of it.
    (answer,) = cluster.second.run(ask(tokens, "other"))
    assert answer.read == 0
    assert answer.outcome("created") == 10 * BLOCK
    assert answer.tokens == expected
    shutil.rmtree(cluster.files)
    for _ in range(3):
        cluster.second.call("empty")
        (answer,) = cluster.second.run(ask(tokens))
        assert answer.outcome("read_files") == 0
        assert answer.tokens == expected
        if answer.outcome("read_resp"):
            break
    assert answer.outcome("read_resp") == 10 * BLOCK
