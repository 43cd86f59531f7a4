"""Every query of every panel returns data, of a real server under real traffic."""

import pytest

from demo import board
from tests.engine.bodies import EPHEMERAL, block, text
from tests.engine.server import MODEL, NAMED_KEY, REPAIRED_KEY
from tests.monitoring.station import Station

pytestmark = pytest.mark.engine


def traffic(station: Station) -> None:
    """Whatever panels show, once."""
    name = station.new(NAMED_KEY)
    station.go_on(name, key=NAMED_KEY)
    # From the CPU tier, and from Redis.
    station.reset(external=False)
    station.go_on(name, key=NAMED_KEY)
    station.reset()
    station.go_on(name, key=NAMED_KEY)
    # A break, with what is read behind it.
    changed = [block(f"{name} at another time", 300, cache_control=EPHEMERAL)]
    station.go_on(name, key=NAMED_KEY, system=changed)
    # A marker that does not count, and a prompt too short to be cached.
    station.chat(text("a short one", 10), prompt_cache_options={"ttl": "9m"})
    # Tools that come in another order, of an organisation for which that is put right.
    tools = [
        {"name": f"look{i}", "description": text(f"{name} {i}", 80), "input_schema": {}}
        for i in range(2)
    ]
    for order in (1, -1):
        station.go_on(f"{name} repaired", key=REPAIRED_KEY, tools=tools[::order])
    # More than the tiers hold, and more than the organisation's quota.
    for _ in range(6):
        station.new(NAMED_KEY, 500)
    # A session that is over.
    station.go_on(name, key=NAMED_KEY, session_over=True)
    # A lifetime that is over.
    station.api.clock.advance(301)
    station.new()


def test_every_query_of_every_panel_returns_data(station: Station) -> None:
    for _ in range(2):
        traffic(station)
    station.redis.kill()
    station.new()
    station.redis.start()
    station.new()
    asked = []
    for _ in range(10):
        station.new()
        asked = board.ask(station.prometheus, station.seconds)
        if all(one.series for one in asked):
            break
    assert len({one.panel for one in asked}) > 40
    assert [one.panel for one in asked if not one.series] == []


def test_a_dashboard_without_a_server_says_so(station: Station) -> None:
    healthy = board.expressions()["Healthy?"][0]
    chosen = {"job": "vllm", "model_name": MODEL, "instance": ".*", "engine": ".*"}
    window = {"__range": "10s", "__rate_interval": "4s"}
    assert station.prometheus.query(board.substituted(healthy, chosen | window))
    chosen["job"] = "another"
    assert station.prometheus.query(board.substituted(healthy, chosen | window)) == []
