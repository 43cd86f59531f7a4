from collections.abc import Iterator

import pytest

from tests.redis.servers import REDIS_SERVER
from tests.routers.fleet import Fleet, running_fleet

if REDIS_SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.empty()
    return running
