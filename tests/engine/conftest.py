from collections.abc import Iterator

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import Engine


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
