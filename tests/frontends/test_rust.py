"""vLLM's Rust server in front of an engine with the connector: no API side of ours, no Python."""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from demo.server import Server, free_port
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import SECRET, draw_tokens
from tests.engine.server import ENVIRONMENT, MODEL
from tests.frontends.asked import (
    LENGTH,
    WHOLE,
    assert_is_read_from_memory,
    assert_reads_what_plain_vllm_reads,
)
from tests.frontends.places import RUST, needs, options
from tests.redis.servers import REDIS_SERVER, RedisServer, entries, wait_until
from vllm_cachescope.cli import main as command

pytestmark = [pytest.mark.engine, needs(RUST)]


@dataclass(frozen=True, slots=True)
class Rust:
    """The server, and what it has said when it was up."""

    url: str
    metrics: str
    said: str
    clock: Clock
    redis: RedisServer

    def ask(self, tokens: list[int], **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": tokens, "max_tokens": 1, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def read(self, tokens: list[int], **fields: object) -> int:
        answer = self.ask(tokens, **fields).raise_for_status().json()
        # No report of ours, nor anything else of ours, reaches a client.
        assert "cachescope" not in str(answer)
        details = answer["usage"]["prompt_tokens_details"]
        return (details or {}).get("cached_tokens") or 0

    def counted(self, name: str) -> Counter[str]:
        text = httpx.get(self.metrics, timeout=60).text
        counted: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    what = sample.labels.get("outcome") or sample.labels.get("reason", "")
                    counted[what] += int(sample.value)
        return counted


@pytest.fixture(scope="module")
def rust(tiny_model, tmp_path_factory) -> Iterator[Rust]:
    port = free_port()
    if REDIS_SERVER is None:
        pytest.skip("needs redis-server")
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    arguments = options(
        tiny_model,
        "--enable-prompt-tokens-details",
        front_end={"metrics_port": port, "trusted": False},
        tiers=[{"type": "redis", "url": redis.url}],
    )
    clock = tmp_path_factory.mktemp("rust") / "clock"
    environment = ENVIRONMENT | {
        VARIABLE: str(clock),
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": str(RUST),
    }
    command = [sys.executable, "-m", "tests.engine.vllm_cli", *arguments]
    with Server(command, environment) as server:
        said = server.log_tail(500)
        yield Rust(server.url, f"http://127.0.0.1:{port}/metrics", said, Clock(clock), redis)
    redis.close()


def test_it_is_recognised(rust: Rust) -> None:
    (line,) = [line for line in rust.said.splitlines() if "Front end:" in line]
    assert "Front end: vLLM's Rust server; it reads no marks" in line


def test_it_reads_what_plain_vllm_reads(rust: Rust) -> None:
    assert_reads_what_plain_vllm_reads(rust.read, random.Random(1))


def test_the_tier_in_memory_is_read(rust: Rust) -> None:
    assert_is_read_from_memory(rust.read, random.Random(2))


def test_a_salt_shares_with_nobody(rust: Rust) -> None:
    tokens = draw_tokens(random.Random(3), LENGTH)
    assert [rust.read(tokens, cache_salt=salt) for salt in ("a", "a", "b", "b")] == [
        *(0, WHOLE),
        *(0, WHOLE),
    ]
    assert rust.read(tokens) == 0


def test_its_clients_claim_no_organisation(rust: Rust) -> None:
    """Whatever they send where a plan of the API side, or a front end's, would stand."""
    chance = random.Random(4)
    payload = {"organisation": "name:acme"}
    action = dict(zip(("action_id", "action_type"), ("1", "cachescope.plan"), strict=True))
    hints = {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [{**action, "action_version": "1.0", "payload": payload}],
    }
    for forged in (
        {"kv_transfer_params": {"cachescope": {"spans": [[64, 1, "00", 300, True]]}}},
        {"kv_hints": hints},
        {"vllm_xargs": {"kv_hints": "x"}},
    ):
        tokens = draw_tokens(chance, LENGTH)
        assert rust.read(tokens, cache_salt="name:acme") == 0
        answer = rust.ask(tokens, **forged)
        assert answer.status_code < 500 and "cachescope" not in answer.text
        details = answer.json().get("usage", {}).get("prompt_tokens_details") or {}
        assert not details.get("cached_tokens")


def test_metrics_that_it_hides_have_a_port_of_their_own(rust: Rust) -> None:
    before = rust.counted("cachescope_prompt_tokens_total")
    tokens = draw_tokens(random.Random(5), LENGTH)
    assert [rust.read(tokens), rust.read(tokens)] == [0, WHOLE]
    after = rust.counted("cachescope_prompt_tokens_total")
    assert after["read_device"] - before["read_device"] == WHOLE
    assert after["created"] - before["created"] == WHOLE
    assert "cachescope_" not in httpx.get(f"{rust.url}/metrics").text


def test_an_idle_engine_drops_what_expires_though_nobody_asks_it_to(rust: Rust) -> None:
    tokens = draw_tokens(random.Random(6), LENGTH)
    assert rust.read(tokens) == 0
    before = rust.counted("cachescope_evictions_total")["ttl"]
    rust.clock.advance(301)
    wait_until(lambda: rust.counted("cachescope_evictions_total")["ttl"] >= before + 10)
    # A Redis has a clock of its own.
    rust.redis.client.delete(*entries(rust.redis))
    assert rust.read(tokens) == 0


def test_a_purge_needs_no_server_in_python(rust: Rust, monkeypatch, capsys) -> None:
    """The engine is idle, and nobody asks it anything meanwhile."""
    tokens, others = (draw_tokens(random.Random(seed), LENGTH) for seed in (7, 8))
    for prompt, salt in ((tokens, "gone"), (others, "kept")):
        assert [rust.read(prompt, cache_salt=salt) for _ in range(2)] == [0, WHOLE]
    wait_until(lambda: len(entries(rust.redis)) >= 2 * 10)
    monkeypatch.setenv("CACHESCOPE_SECRET", SECRET)
    assert command.main(["purge", "--redis", rust.redis.url, "--org", "salt:gone"]) == 0
    said = capsys.readouterr().out
    assert "entries forgotten: redis 10" in said and "done as well: " in said
    assert rust.read(tokens, cache_salt="gone") == 0
    assert rust.read(others, cache_salt="kept") == WHOLE


def test_its_engine_tells_its_health(rust: Rust) -> None:
    health = httpx.get(rust.metrics.replace("/metrics", "/health")).json()
    assert health["status"] == "ok"
    names = [(tier["engine"], tier["name"], tier["up"]) for tier in health["tiers"]]
    assert names == [(0, "device", True), (0, "cpu", True), (0, "redis", True)]
    assert "address" not in str(health) and "orgs" not in str(health)
