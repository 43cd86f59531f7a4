"""What a remote tier tells of its exchanges with a Redis, and of what waits for one."""

from collections import Counter

from tests.redis.engine_side import EngineSide, keys
from tests.redis.servers import wait_until


def exchanges(side: EngineSide) -> Counter[tuple[str, ...]]:
    """Return how many exchanges there were since the last time, by operation and outcome."""
    found: Counter[tuple[str, ...]] = Counter()
    for (tier, *labels), counts, seconds in side.tier.take_times().take():
        assert tier == "redis" and 0 < seconds < 5 * counts.total()
        found[tuple(labels)] += counts.total()
    return found


def test_exchanges_are_timed_by_what_they_are_for(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(3))
    side.get_exact(keys(3))
    side.use(keys(3))
    expected = {("store", "ok"), ("lookup", "ok"), ("load", "ok"), ("touch", "ok")}
    found: Counter[tuple[str, ...]] = Counter()
    wait_until(lambda: found.update(exchanges(side)) or set(found) == expected)
    assert found == dict.fromkeys(expected, 1)


def test_what_waits_for_a_hanging_server_shows_until_it_is_over(server, start_engine_side):
    side = start_engine_side(server.url)
    idle = dict.fromkeys(("lookup", "touch", "load", "store"), 0)
    side.put(keys(4))
    assert side.tier.queues() == idle
    exchanges(side)
    server.stop()
    job = side.put(keys(5, "new"), wait=False)
    side.tier.lookup("request", keys(1)[0])
    side.tier.flush()
    waiting = side.tier.queues()
    assert (waiting["lookup"], waiting["store"]) == (1, 5)
    side.step_until(job)
    wait_until(lambda: side.tier.queues() == idle)
    server.resume()
    found = exchanges(side)
    assert found["store", "failed"] >= 1 and found["lookup", "failed"] >= 1
    assert not any(outcome == "ok" for _, outcome in found)


def test_a_server_that_is_not_there_leaves_no_queue(server, start_engine_side):
    side = start_engine_side(server.url)
    server.kill()
    for _ in range(side.limits.failures + 2):
        side.get(keys(3))
    side.put(keys(3))
    side.use(keys(3))
    wait_until(lambda: not any(side.tier.queues().values()))
