"""Statistics of a busy engine are held for a while; those of an idle one never are."""

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from vllm_cachescope.connectors.vllm.engine.held_stats import HELD_S, HeldStats


def of_a_step(tokens: int, level: float) -> OffloadingConnectorStats:
    stats = OffloadingConnectorStats()
    stats.increase_counter("tokens", tokens, ("created",))
    stats.set_gauge("level", level)
    stats.observe_histogram("seconds", level)
    return stats


def test_nothing_is_lost_of_what_is_held() -> None:
    now = [100.0]
    held = HeldStats(lambda: now[0])
    assert held.take(is_idle=False) is not None  # the first step's
    for step in range(1, 5):
        held.add(of_a_step(tokens=10, level=step))
        assert held.take(is_idle=False) is None
        now[0] += HELD_S / 5
    now[0] += HELD_S / 2
    taken = held.take(is_idle=False)
    assert taken is not None
    values = {"tokens": {("created",): 40}, "level": {(): 4}, "seconds": {(): [1, 2, 3, 4]}}
    assert taken.data["data"] == values
    again = held.take(is_idle=True)
    assert again is not None and again.is_empty()


def test_an_engine_without_requests_keeps_nothing_back() -> None:
    held = HeldStats(lambda: 100.0)
    for tokens in (1, 2):
        held.add(of_a_step(tokens, level=0))
        taken = held.take(is_idle=True)
        assert taken is not None and taken.data["data"]["tokens"] == {("created",): tokens}
