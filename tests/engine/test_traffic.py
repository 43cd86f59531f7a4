"""Whatever befalls random traffic, each token that was not read has a cause."""

import time
from collections.abc import Iterator

import pytest

from tests.engine.engine import BLOCK_BYTES
from tests.engine.server import SMALL, Api, serve_scoped
from tests.engine.traffic import Traffic

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def slow_server(tiny_model, tmp_path_factory) -> Iterator[Api]:
    """A server with little room, which takes many steps for a prompt."""
    scratch = tmp_path_factory.mktemp("traffic")
    options = (*SMALL, "--max-num-batched-tokens", "300")
    with serve_scoped(tiny_model, scratch, *options, cpu_bytes=24 * BLOCK_BYTES) as api:
        yield api


@pytest.mark.parametrize(
    ("seed", "requests"), [(1, 300), pytest.param(2, 10_000, marks=pytest.mark.slow)]
)
def test_nothing_is_unexplained(slow_server: Api, seed: int, requests: int) -> None:
    traffic = Traffic(slow_server, seed)
    traffic.send(requests)
    time.sleep(1)  # What was put off is diagnosed once the engine has told of it.
    assert sum(slow_server.metrics("cachescope_unexplained_tokens_total").values()) == 0
    assert traffic.served["200"] > traffic.served["hung up"] > requests // 50
