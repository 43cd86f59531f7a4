"""Each alert is brought about by a real fault on a real server, reaches an operator through a real
Prometheus and Alertmanager, and ends with the fault. The rules are the shipped ones, with seconds
in place of minutes and days."""

import itertools
from contextlib import contextmanager

import pytest

from tests.engine.bodies import agent_body
from tests.engine.server import NAMED_KEY
from tests.monitoring.faults import ANOTHER_SECRET, FORGETFUL
from tests.monitoring.station import Station

pytestmark = pytest.mark.engine


@contextmanager
def fault(station: Station, name: str):
    path = station.faults / name
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def test_the_redis_is_killed(station: Station) -> None:
    station.new()
    station.redis.kill()
    try:
        heard = station.until("firing", "CacheScopeTierDown", station.new, tier="redis")
    finally:
        station.redis.start()
    assert heard["labels"]["severity"] == "critical"
    assert heard["annotations"]["summary"].startswith("The tier redis of 127.0.0.1:")
    assert heard["annotations"]["runbook_url"] == "docs/observability.md#cachescopetierdown"
    station.until("resolved", "CacheScopeTierDown", station.new, tier="redis")


@pytest.mark.slow
def test_server_and_engine_have_different_secrets(station: Station) -> None:
    with fault(station, ANOTHER_SECRET):
        station.until("firing", "CacheScopeRefusedPlans", station.new)
    station.until("resolved", "CacheScopeRefusedPlans", station.new)


@pytest.mark.slow
def test_clients_break_their_prefixes(station: Station) -> None:
    numbers = itertools.count()

    def break_one() -> None:
        name = f"broken {next(numbers)}"
        station.send(agent_body(name), name)
        station.send(agent_body(name, tool="Weighs other things."), name)

    heard = station.until("firing", "CacheScopeBreaks", break_one, cause="tools_changed")
    assert heard["labels"]["region"] == "tools"
    station.until("resolved", "CacheScopeBreaks", station.new, cause="tools_changed")


@pytest.mark.slow
def test_memory_is_small(station: Station) -> None:
    """Of the device and the CPU tier the larger one has the last copies: here the device."""
    heard = station.until("firing", "CacheScopeChurn", lambda: station.new(words=500))
    assert heard["labels"]["tier"] == "device"
    name = station.new()
    station.until("resolved", "CacheScopeChurn", lambda: station.go_on(name, 1), tier="device")


@pytest.mark.slow
def test_an_organisation_presses_against_its_quota(station: Station) -> None:
    station.until(
        "firing", "CacheScopeQuotaPressure", lambda: station.new(NAMED_KEY, 500), tier="cpu"
    )
    name = station.new()
    station.until("resolved", "CacheScopeQuotaPressure", lambda: station.go_on(name, 1), tier="cpu")


@pytest.mark.slow
def test_the_redis_is_slow(station: Station) -> None:
    """It answers questions, so that it counts as up; what it loads comes too late."""

    def load() -> None:
        name = station.new()
        station.reset()
        station.go_on(name)

    station.proxy.chunk, station.proxy.pause_s = 2_000, 0.05
    try:
        station.until("firing", "CacheScopeTierLate", load, tier="redis")
    finally:
        station.proxy.chunk, station.proxy.pause_s = None, 0.0
    station.until("resolved", "CacheScopeTierLate", load, tier="redis")


@pytest.mark.slow
def test_the_engine_forgets(station: Station) -> None:
    def lose() -> None:
        name = station.new()
        station.reset()
        station.redis.client.flushall()
        station.go_on(name)

    with fault(station, FORGETFUL):
        station.until("firing", "CacheScopeUnexplainedTokens", lose)
    station.until("resolved", "CacheScopeUnexplainedTokens", station.new)


@pytest.mark.slow
def test_less_is_read_than_usually(station: Station) -> None:
    name = station.new()
    usual = "job_model:cachescope_hit_ratio:baseline > 0.8"
    while not station.prometheus.query(usual):
        station.go_on(name, 1)
    heard = station.until("firing", "CacheScopeHitRatioLow", station.new)
    assert "points below the median" in heard["annotations"]["description"]
    station.until("resolved", "CacheScopeHitRatioLow", lambda: station.go_on(name, 1))
