from collections.abc import Iterator

import pytest

from tests.redis.engine_side import EngineSide
from tests.redis.servers import REDIS_SERVER, RedisServer

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
