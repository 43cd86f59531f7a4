"""The tier on a Redis Cluster of three nodes."""

import subprocess
import time

import pytest
import redis

from tests.redis.engine_side import SECRET, EngineSide, keys
from tests.redis.servers import wait_until
from vllm_cachescope.connectors.redis.store import FRONT_BYTES
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.leases import Leases


@pytest.fixture
def side(nodes, start_engine_side) -> EngineSide:
    for node in nodes:
        node.client.flushall()
    # One node is enough to find the others.
    return start_engine_side(f"redis+cluster://127.0.0.1:{nodes[1].port}", timeout_s=5.0)


def test_blocks_spread_over_the_nodes(nodes, side, start_engine_side):
    side.put(keys(40))
    assert all(node.client.dbsize() > 3 for node in nodes)
    other = start_engine_side(f"redis+cluster://127.0.0.1:{nodes[2].port},127.0.0.1:1")
    assert len(other.get_exact(keys(40)).keys) == 40


def test_lifetimes_and_deletions(nodes, side):
    side.put(keys(20), ttl_s=300)
    side.use(keys(20), 3600)
    client = redis.RedisCluster("127.0.0.1", nodes[0].port)
    wait_until(lambda: all(client.pttl(side.name(key)) > 3_500_000 for key in keys(20)))
    for name in map(side.name, keys(20)):
        lease = client.getrange(name, HEADER_BYTES, FRONT_BYTES - 1)
        assert Leases(SECRET).end(name, lease) > (time.time() + 3500) * 1000
    client.set(side.name(keys(20)[3]), b"damaged", ex=100)
    assert set(side.get_exact(keys(20)).keys) == set(keys(20)) - {keys(20)[3]}
    wait_until(lambda: not client.exists(side.name(keys(20)[3])))
    client.close()


def test_slots_that_move_while_it_runs(nodes, side):
    """Move every slot of one node to another, and back: some misses, no wrong block."""
    side.put(keys(40))
    ids = [node.client.cluster("myid").decode() for node in nodes]
    for source, target in ((0, 1), (1, 0)):
        mover = subprocess.Popen(
            [
                *("redis-cli", "--cluster", "reshard", f"127.0.0.1:{nodes[0].port}"),
                *("--cluster-from", ids[source], "--cluster-to", ids[target]),
                *("--cluster-slots", "200", "--cluster-yes"),
            ],
            stdout=subprocess.DEVNULL,
        )
        while mover.poll() is None:
            side.get_exact(keys(40))
            side.put(keys(40))
        assert mover.returncode == 0
    wait_until(lambda: len(side.get_exact(keys(40)).keys) == 40)
    assert side.tier.usable
