"""Which versions of vLLM an engine starts on without a warning."""

import pytest

from vllm_cachescope.connectors.vllm.versions import TRIED, warn_if_untried


@pytest.mark.parametrize("version", [f"{tried}.0" for tried in TRIED] + ["0.33.1+cpu"])
def test_a_version_that_was_tried_is_quiet(version: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_untried(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.34.0", "0.3.1", "1.0", "0.330.0", "dev"])
def test_any_other_is_warned_of_by_name(version: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_untried(version)
    (record,) = caplog.records
    assert f"vLLM {version}" in record.getMessage()
