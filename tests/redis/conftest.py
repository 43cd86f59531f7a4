import subprocess
from collections.abc import Iterator

import pytest

from tests.redis.engine_side import EngineSide
from tests.redis.servers import REDIS_SERVER, RedisServer, free_port, wait_until

if REDIS_SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)


@pytest.fixture
def start_server(tmp_path) -> Iterator:
    servers: list[RedisServer] = []

    def start(*options: str, port: int | None = None) -> RedisServer:
        servers.append(RedisServer(tmp_path, *options, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_server) -> RedisServer:
    return start_server()


@pytest.fixture
def start_engine_side() -> Iterator:
    sides: list[EngineSide] = []

    def start(url: str, **options: object) -> EngineSide:
        sides.append(EngineSide(url, **options))
        return sides[-1]

    yield start
    for side in sides:
        side.close()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory) -> Iterator[list[RedisServer]]:
    """A Redis Cluster of three nodes. It holds what other tests have left."""
    nodes = []
    for _ in range(3):
        directory = tmp_path_factory.mktemp("node")
        options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
        nodes.append(RedisServer(directory, *options))
    addresses = [f"127.0.0.1:{node.port}" for node in nodes]
    subprocess.run(
        ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: all(node.client.cluster("info")["cluster_state"] == "ok" for node in nodes))
    yield nodes
    for node in nodes:
        node.close()
