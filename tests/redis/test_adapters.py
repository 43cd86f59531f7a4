"""Engines that share a Redis and LoRA adapters, which are replaced where they lie."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, MAX_TOKENS_PER_STEP, Ask, Engine, draw_tokens
from tests.engine.lora import build_adapter
from tests.redis.pair import ask
from tests.redis.replica import Replica
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.connectors.vllm import shm_regions

pytestmark = pytest.mark.engine

LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def engines(server, tmp_path_factory) -> Iterator[tuple[Replica, Replica]]:
    model = build(MODELS / "tiny", TINY)
    tier = {"type": "redis", "url": server.url, "load_deadline": "2s", "timeout": "2s"}
    scratches = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    one, other = (Replica(model, scratch, {"tiers": [tier]}, **LORA) for scratch in scratches)
    yield one, other
    one.stop()
    other.stop()
    shm_regions.remove_stale()


def stored(server: RedisServer) -> int:
    return len(entries(server))


def test_an_adapter_reads_what_its_own_weights_have_computed(engines, server, tmp_path):
    one, other = engines
    adapter = build_adapter(tmp_path / "adapter", seed=1)
    tokens = draw_tokens(random.Random(1), 6 * BLOCK + 7)

    def exact(engine: Replica) -> int:
        expected = engine.call("uncached", tokens, 8, adapter)
        (answer,) = engine.run(replace(ask(tokens), adapter=adapter))
        assert answer.tokens == expected
        assert answer.report is not None and answer.report.read_tokens == answer.read
        return answer.read

    for engine in engines:
        engine.call("load_adapter", adapter)
    before = stored(server)
    assert exact(one) == 0
    wait_until(lambda: stored(server) == before + 6)
    assert exact(other) == exact(one) == 6 * BLOCK
    assert one.call("uncached", tokens) != one.call("uncached", tokens, 8, adapter)

    # Other weights at the same path: whoever has not loaded them cannot know what it has.
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    build_adapter(adapter, seed=2)
    assert exact(one) == 0
    other.call("load_adapter", adapter)
    assert exact(other) == 0
    assert exact(other) == 6 * BLOCK
    wait_until(lambda: stored(server) == before + 12)
    assert exact(one) == 0
    one.call("load_adapter", adapter)
    other.call("empty_device")
    assert exact(one) == exact(other) == 6 * BLOCK

    # Back to what they were.
    shutil.copytree(old, adapter, dirs_exist_ok=True)
    for engine in engines:
        engine.call("load_adapter", adapter)
        assert exact(engine) == 6 * BLOCK


def run_and_replace(engine: Engine, running: Ask) -> None:
    """Run a prompt, and replace its adapter once a step has computed some of it."""
    before = engine.resident()
    request = engine.add(running)
    while engine.resident() == before:
        engine.step()
    assert running.adapter is not None
    engine.load_adapter(build_adapter(running.adapter, seed=2))
    while engine.step():
        pass
    engine.answer(request)


def test_a_prompt_whose_adapter_is_replaced_meanwhile_leaves_nothing_behind(
    engines, server, tmp_path
):
    one, _ = engines
    adapter = build_adapter(tmp_path / "adapter", seed=1)
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    one.call("load_adapter", adapter)
    tokens = draw_tokens(random.Random(2), 6 * BLOCK + 7)
    expected = one.call("uncached", tokens, 8, adapter)
    one.call(run_and_replace, replace(ask(tokens), adapter=adapter))
    # With the old weights again, only the first step's blocks are of use.
    shutil.copytree(old, adapter, dirs_exist_ok=True)
    one.call("load_adapter", adapter)
    (answer,) = one.run(replace(ask(tokens), adapter=adapter))
    assert answer.tokens == expected
    assert answer.read == MAX_TOKENS_PER_STEP
