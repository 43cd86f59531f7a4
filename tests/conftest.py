import logging

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


@pytest.fixture(scope="session", autouse=True)
def fork_server(request: pytest.FixtureRequest) -> None:
    """Have vLLM imported for the engines while the first tests run."""
    if any(item.get_closest_marker("engine") for item in request.session.items):
        forks.start_server()
