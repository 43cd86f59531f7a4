from collections.abc import Iterator

import pytest

from demo import prometheus
from demo.model import MODELS, TINY, build
from tests.monitoring import alertmanager
from tests.monitoring.station import Station, watched
from tests.redis.servers import REDIS_SERVER


@pytest.fixture(scope="session")
def station(tmp_path_factory) -> Iterator[Station]:
    """The one server under watch. Its caches are as other tests have left them."""
    needed = {
        "prometheus": prometheus.BINARY,
        "prometheus-alertmanager": alertmanager.BINARY,
        "redis-server": REDIS_SERVER,
    }
    if missing := [name for name, path in needed.items() if path is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    model = build(MODELS / "tiny", TINY)
    with watched(model, tmp_path_factory.mktemp("station")) as station:
        yield station
