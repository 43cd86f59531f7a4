import pytest

from demo.model import MODELS, TINY, build


@pytest.fixture(scope="session")
def tiny_model():
    return build(MODELS / "tiny", TINY)
