from collections.abc import Iterator

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import Engine
from tests.engine.server import ONE_PROCESS, Api, serve, serve_scoped


@pytest.fixture(scope="session")
def tiny_model():
    return build(MODELS / "tiny", TINY)


@pytest.fixture(scope="session")
def shared_engine(tiny_model, tmp_path_factory) -> Iterator[Engine]:
    engine = Engine(tiny_model, tmp_path_factory.mktemp("engine"))
    yield engine
    engine.stop()


@pytest.fixture
def engine(shared_engine) -> Engine:
    """The one engine in this process, with empty caches."""
    shared_engine.empty()
    return shared_engine


@pytest.fixture(scope="session")
def api(tiny_model, tmp_path_factory) -> Iterator[Api]:
    """The one API server with the plugin. Its caches are as other tests have left them."""
    with serve_scoped(tiny_model, tmp_path_factory.mktemp("server"), as_user=True) as api:
        yield api


@pytest.fixture(scope="module")
def plain_url(tiny_model) -> Iterator[str]:
    """A server of the same model, by a vLLM that has never heard of the plugin."""
    with serve(tiny_model, [*ONE_PROCESS], {"VLLM_PLUGINS": "none"}) as url:
        yield url
