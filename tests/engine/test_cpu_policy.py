"""The CPU tier's policy under vLLM's own manager of the tier, without an engine."""

import json
import time

import pytest
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.runs import RequestSignals
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.tiers import cpu_policy
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_order import make_learned, make_order

CHUNKS = 100


class Tier:
    """The tier with a scheduler side that knows what the policy asks, on a driven clock."""

    def __init__(self, settings: EvictionSettings) -> None:
        self.ledger, self.time = Ledger(), 0.0
        self.requests = 0
        self.used: tuple[list[bytes], RequestSignals] = [], RequestSignals()
        self.evicted: list[bytes] = []
        self.manager = CPUOffloadingManager(
            CHUNKS, cpu_policy.ScopePolicy.__name__, cpu_policy.__name__
        )
        self.order = make_order(settings, None, CHUNKS)
        policy = self.manager._policy  # noqa: SLF001 (as `CpuTier` binds it)
        policy.bind(self, None, self.order)

    def now(self) -> float:
        return self.time

    def ttl_and_owner(self, key, context) -> tuple[int, bytes]:
        return self.ttl_s, b"o" * 32

    def finished(self, context) -> tuple[list[bytes], RequestSignals, str]:
        return *self.used, context.req_id

    def on_evicted(self, key, entry, reason, by) -> None:
        self.evicted.append(key)

    def ask(self, name: str, chunks: int, output: int, ttl_s: int = 300, held: int = 0) -> int:
        """Run a request whose first ``held`` chunks the device has; return how many of those
        behind it were read."""
        self.requests += 1
        self.ttl_s = ttl_s
        context = ReqContext(str(self.requests))
        keys = [make_offload_key(b"%s/%d" % (name.encode(), i), 0) for i in range(chunks)]
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (i + 1))
        self.manager.on_new_request(context)
        read = held
        while read < chunks and self.manager.lookup(keys[read], context).name == "HIT":
            read += 1
        loaded = keys[held:read]
        if loaded:
            self.manager.prepare_load(loaded, context)
            self.manager.complete_load(loaded, context)
        for start in range(read, chunks, 4):
            part = keys[start : start + 4]
            output_spec = self.manager.prepare_store(part, context)
            assert output_spec is not None
            self.manager.complete_store(output_spec.keys_to_store, context)
            self.time += 0.05
        self.used = list(keys), RequestSignals(output)
        self.manager.on_request_finished(context)
        return len(loaded)


def test_it_keeps_what_returns_and_learns_it_from_vllms_own_calls() -> None:
    tier = Tier(EvictionSettings())
    read = 0
    for number in range(600):
        # Every third prompt had a long answer, and comes back a minute later.
        tier.ask(f"p{number}", 6, output=900 if number % 3 == 0 else 10)
        if number >= 20 and (number - 20) % 3 == 0:
            hits = tier.ask(f"p{number - 20}", 7, output=10)
            read += hits if number > 400 else 0
        tier.time += 3.0
        if number == 300:
            time.sleep(0.5)  # Fits run on a thread of their own.
    # LRU holds the latest 16 prompts, and reads none of them.
    assert read > 0.7 * 6 * 66
    assert tier.evicted


@pytest.mark.parametrize("held", [0, 3])
def test_a_use_counts_from_the_first_chunk_on_though_the_device_held_it(held) -> None:
    tier = Tier(EvictionSettings())
    tier.ask("a", 6, 10)
    tier.ask("b", 6, 10)
    tier.time += 50.0
    assert tier.ask("a", 8, 10, held=held) == 6 - held
    order = tier.order
    first, last = (make_offload_key(b"a/%d" % i, 0) for i in (0, 7))
    assert order.runs[first] is order.runs[last]
    assert order.runs[first].turn == 1
    victims = order.victims(6, tier.time, lambda key: False)
    assert {key[:1] for key in victims} == {b"b"}


def test_what_was_learned_is_kept_in_a_file_and_found_again(tmp_path) -> None:
    path = tmp_path / "learned.json"
    tier = Tier(EvictionSettings(state_file=path))
    for number in range(80):
        tier.ask(f"p{number % 20}", 5, 10)
        tier.time += 5.0
    deadline = time.monotonic() + 20

    def returns() -> float:
        return sum(json.loads(path.read_text())["returns"]) if path.exists() else 0.0

    # What was written first may be of a time before there were any.
    while returns() <= 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert returns() > 5
    again = make_order(EvictionSettings(state_file=path), None, CHUNKS)
    assert again.counted().returns.sum() > 5
    # The device's order goes on from it as well.
    on_device = make_learned(EvictionSettings(state_file=path), CHUNKS)
    assert on_device.counted().returns.sum() > 5
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{damaged")
    assert not make_order(EvictionSettings(state_file=damaged), None, CHUNKS).counted().kinds


def test_the_former_order_can_be_chosen() -> None:
    tier = Tier(EvictionSettings(policy="lifetime"))
    for number in range(20):
        tier.ask(f"p{number}", 5, 10)
        tier.time += 1.0
    tier.ask("new", 5, 10)
    assert [key[:3] for key in tier.evicted] == [b"p0/"] * 5
