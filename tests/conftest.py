import logging

import pytest


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Our loggers are below vLLM's, which hands nothing on to the root logger, where pytest
    listens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog
