import logging
import random

import pytest
from hypothesis import settings

import tests.examples  # noqa: F401 — it has the profiles
from tests.engine import forks

settings.load_profile("usual")


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Our loggers are below vLLM's, which hands nothing on to the root logger, where pytest
    listens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """What a test draws: the same each time that it runs."""
    return random.Random(request.node.name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have vLLM imported from the first test with an engine on. Earlier it would take a core from
    tests that measure time."""
    if item.get_closest_marker("engine"):
        forks.start_server()
