"""Engines with tiers of several kinds: each hit has its source, and every answer is exact."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import REDIS_SERVER, RedisServer, entries, wait_until
from vllm_cachescope.connectors.vllm import shm_regions

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
        return entries(self.near)

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

    def start(*tiers: dict[str, object], fresh: bool) -> Replica:
        scratch = tmp_path_factory.mktemp("engine")
        return Replica(model, scratch, {"tiers": list(tiers)}, fresh)

    first = start(redis_tier, files_tier, resp_tier, fresh=False)
    cluster = Cluster(near, resp, files, first, start(files_tier, resp_tier, fresh=True))
    cluster.first.ready()
    cluster.second.ready()
    yield cluster
    cluster.first.stop()
    cluster.second.stop()
    shm_regions.remove_stale()
    near.close()
    resp.close()


def ask(tokens: list[int], org: str = "acme") -> Ask:
    return Ask(tokens, sealed(org_plan(org, tokens)))


def test_one_prompt_is_read_from_memory_redis_and_files(cluster: Cluster):
    tokens = draw_tokens(random.Random(1), 12 * BLOCK + 7)
    first = cluster.first
    near, files = [set()], [set()]
    for blocks in (4, 8, 12):
        (answer,) = first.run(ask(tokens[: blocks * BLOCK + 7]))
        cluster.stored(blocks)
        near.append(cluster.blocks_near())
        files.append(cluster.in_files())
    # The first third is in memory, the second only in Redis, the last only in files.
    cluster.near.client.delete(*(near[3] - near[2]))
    for file in files[2] - files[1]:
        file.unlink()
    wait_until(lambda: len(cluster.behind_resp()) == 12)
    cluster.resp.client.delete(*cluster.behind_resp())
    expected = answer.tokens
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


def test_vllms_own_count_by_source_knows_files_from_other_stores(cluster: Cluster):
    pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="vLLM has it from 0.32 on")
    sources = ("disk", "external_unspecified", "host")

    def counted() -> list[float]:
        metric = "vllm:prompt_tokens_cached_by_source"
        return [cluster.first.call("counter", metric, source) for source in sources]

    tokens, files = draw_tokens(random.Random(2), 8 * BLOCK + 7), cluster.in_files()
    near = cluster.blocks_near()
    cluster.first.run(ask(tokens))
    wait_until(lambda: len(cluster.in_files() - files) == len(cluster.blocks_near() - near) == 8)
    wait_until(lambda: len(cluster.behind_resp()) >= 8)
    cluster.resp.client.flushall()
    cluster.near.client.delete(*(cluster.blocks_near() - near))
    cluster.first.call("empty")
    before = counted()
    (answer,) = cluster.first.run(ask(tokens))
    assert answer.outcome("read_files") == 8 * BLOCK
    grown = [now - then for now, then in zip(counted(), before, strict=True)]
    assert grown == [8 * BLOCK, 0, 0]


def test_a_new_process_reads_what_an_old_one_left(cluster: Cluster):
    """One prompt is left in files, and one behind the RESP adapter."""
    left = {name: draw_tokens(random.Random(name), 10 * BLOCK + 7) for name in ("files", "resp")}
    expected = {}
    for name, tokens in left.items():
        files, resp = cluster.in_files(), cluster.behind_resp()
        (answer,) = cluster.first.run(ask(tokens))
        expected[name] = answer.tokens
        wait_until(lambda: len(cluster.in_files() - files) == 10)  # noqa: B023
        wait_until(lambda: len(cluster.behind_resp() - resp) == 10)  # noqa: B023
        if name == "files":
            cluster.resp.client.delete(*(cluster.behind_resp() - resp))
        else:
            for file in cluster.in_files() - files:
                file.unlink()
    cluster.first.stop()
    for name, tokens in left.items():
        # Another organisation reads none of it.
        (answer,) = cluster.second.run(ask(tokens, "other"))
        assert answer.read == 0
        assert answer.tokens == expected[name]
        (answer,) = cluster.second.run(ask(tokens))
        assert answer.outcome(f"read_{name}") == 10 * BLOCK
        assert answer.tokens == expected[name]
