"""The ledger of a real server: whatever befalls its requests, it has what the metrics have."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from tests.engine.bodies import text
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import BLOCK_BYTES
from tests.engine.ledgers import agreed, kept_tokens, reading
from tests.engine.otlp import Receiver, Span, receive
from tests.engine.server import MODEL, NAMED_KEY, OPERATOR_TOKEN, SMALL, Api, plugin, serve
from tests.engine.traffic import Traffic
from vllm_cachescope.usage.tables import EVICTIONS, REQUESTS, TOKENS, USAGE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "its own"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receive() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def keeping(tiny_model, tmp_path_factory, directory: Path, receiver: Receiver) -> Iterator[Api]:
    """A server with little room that keeps a ledger and sends traces."""
    scratch = tmp_path_factory.mktemp("server")
    prices = scratch / "prices.yaml"
    prices.write_text(f"models: {{{MODEL}: {{input: 3.0, output: 15.0}}}}")
    path = scratch / "server clock"
    clock = Clock(path)
    options = [
        *plugin(
            cpu_bytes=24 * BLOCK_BYTES,
            ledger={"directory": str(directory), "replica": "the first"},
            prices=str(prices),
        ),
        *SMALL,
        *("--max-num-batched-tokens", "300"),
        *("--otlp-traces-endpoint", receiver.endpoint),
    ]
    environment = {VARIABLE: str(path), "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with serve(tiny_model, options, environment) as url:
        api = Api(url, clock)
        yield api
        whole = agreed(api, directory)
        last = api.post("/v1/completions", {"model": MODEL, "prompt": "Last", "max_tokens": 1})
        prompt_tokens = last.json()["usage"]["prompt_tokens"]
    # What was in the queue is written before the server is gone.
    assert sum(kept_tokens(directory).values()) == sum(whole.values()) + prompt_tokens


@pytest.mark.parametrize("requests", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_it_adds_up_to_the_metrics_to_the_token(
    keeping: Api, directory: Path, requests: int
) -> None:
    traffic = Traffic(keeping, requests)
    traffic.send(requests)
    assert traffic.served["hung up"] > requests // 50
    chat = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
    others = [
        ("/v1/chat/completions", chat | {"n": 2}, 200),
        ("/v1/chat/completions", chat | {"n": 2, "use_beam_search": True}, 200),
        ("/v1/chat/completions", chat | {"max_tokens": -1}, 400),
        ("/v1/chat/completions", chat | {"model": "another"}, 404),
        ("/v1/messages", chat | {"max_tokens": 0}, 200),
        ("/v1/completions", {"model": MODEL, "prompt": text("x", 5000)}, 400),
        ("/inference/v1/generate", {"token_ids": [5] * 70, "sampling_params": {}}, 403),
        ("/tokenize", {"model": MODEL, "prompt": "Hello"}, 200),
        ("/v1/completions", {"model": MODEL, "prompt": "Stop here", "stop": ["e", "a"]}, 200),
    ]
    for path, body, status in others:
        answer = keeping.post(path, body)
        assert answer.status_code == status, (path, answer.text)
    # What the traffic reads from where is left to chance; this is read from memory for certain.
    repeated = chat | {"messages": [{"role": "user", "content": text("kept in memory", 100)}]}
    for _ in range(2):
        assert keeping.post("/v1/chat/completions", repeated).status_code == 200
        keeping.empty_device()
    tokens = agreed(keeping, directory)
    assert {outcome for outcome, *_ in tokens} == {
        *("read_device", "read_cpu", "created", "uncached")
    }
    url, headers = f"{keeping.url}/cachescope/usage", {"x-api-key": OPERATOR_TOKEN}
    answer = httpx.get(url, params={"by": "org,session"}, headers=headers, timeout=60).json()
    total = answer["total"]
    assert total["prompt_tokens"] == sum(row["prompt_tokens"] for row in answer["rows"])
    assert total["prompt_tokens"] == sum(tokens.values())
    assert total["uncached"] + sum(total["created"].values()) + sum(total["read"].values()) == sum(
        tokens.values()
    )
    assert total["breaks"] > 0 and total["output_tokens"] > 0
    assert total["prefill_seconds_saved"] > 0
    assert total["cost_without"] == pytest.approx(3e-6 * sum(tokens.values()))
    with reading(directory) as connection:
        replicas = set(connection.execute(select(REQUESTS.c.replica)).scalars())
    assert replicas == {"the first"}
    counted = keeping.metrics("cachescope_ledger_records_total", "outcome")
    assert counted == {("written",): total["requests"], ("dropped",): 0, ("failed",): 0}


def test_evictions_add_up_to_the_metrics(keeping: Api, directory: Path) -> None:
    """The test before has left more than the tiers hold."""

    def kept() -> dict[tuple[str, str], int]:
        c = EVICTIONS.c
        with reading(directory) as connection:
            sums = select(c.tier, c.part, func.sum(c.entries)).group_by(c.tier, c.part)
            return {(tier, part): int(n) for tier, part, n in connection.execute(sums)}

    def told() -> dict[tuple[str, str], int]:
        return dict(+keeping.metrics("cachescope_org_evictions_total", "tier", "part"))

    deadline = time.monotonic() + 15
    while kept() != told() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kept() == told()
    assert kept()["cpu", "suffered"] == kept()["cpu", "caused"] > 0
    with reading(directory) as connection:
        orgs = set(connection.execute(select(EVICTIONS.c.org)).scalars())
    # The server has served everyone whose blocks it holds.
    assert orgs and "unknown" not in orgs


def test_no_text_of_prompts_is_kept_and_nobody_else_reads_it(keeping: Api, directory: Path) -> None:
    said = "xylophone quarrel"
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": said}]}
    answer = keeping.post("/v1/chat/completions", body).json()
    agreed(keeping, directory)
    assert (directory.stat().st_mode & 0o777) == 0o700
    for file in directory.iterdir():
        assert not file.stat().st_mode & 0o077
        held = file.read_bytes()
        assert b"xylophone" not in held
        assert answer["choices"][0]["message"]["content"].encode() not in held or len(held) == 0


def test_an_organisation_sees_its_own_and_the_command_prints_it(
    keeping: Api, directory: Path, tmp_path: Path
) -> None:
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Mine"}]}
    used = keeping.post("/v1/messages", body, NAMED_KEY, **{"x-session-id": "mine"}).json()["usage"]
    agreed(keeping, directory)
    key = tmp_path / "key"
    key.write_text(NAMED_KEY)
    command = [sys.executable, "-m", "vllm_cachescope", "usage", "--url", keeping.url]
    command += ["--token-file", str(key), "--by", "org,session,model"]
    made = subprocess.run([*command, "--format", "json"], capture_output=True, check=True)
    answer = json.loads(made.stdout)
    (row,) = answer["rows"]
    assert (row["org"], row["session"], row["model"]) == ("name:named", "mine", MODEL)
    assert row["uncached"] == used["input_tokens"]
    table = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "name:named" in table and "name:other" not in table
    other = subprocess.run([*command, "--org", "other"], capture_output=True, text=True)
    assert other.returncode == 1 and "only the operator" in other.stderr


def test_a_purged_session_leaves_its_sums_only(keeping: Api, directory: Path) -> None:
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Gone"}]}
    headers = {"x-session-id": "soon gone"}
    assert keeping.post("/v1/messages", body, NAMED_KEY, **headers).status_code == 200
    before = agreed(keeping, directory)
    purged = keeping.post("/cachescope/purge", {"session": "soon gone"}, NAMED_KEY)
    assert purged.status_code == 200
    deadline = time.monotonic() + 15
    left = 1
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        with reading(directory) as connection:
            left = sum(
                connection.execute(
                    select(func.count()).select_from(table).where(table.c.session == "soon gone")
                ).scalar_one()
                for table in (REQUESTS, USAGE, TOKENS)
            )
    assert not left
    assert kept_tokens(directory) == before


def of_trace(trace_id: str):
    def which(span: Span) -> bool:
        return span.trace_id == trace_id

    return which


def usage_of(span: Span) -> tuple[int, int, int, int]:
    names = ("input_tokens", "cache_read.input_tokens", "cache_creation.input_tokens")
    counts = [span.attributes[f"gen_ai.usage.{name}"] for name in (*names, "output_tokens")]
    return tuple(counts)


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_own_span_has_usage_and_cause(keeping: Api, receiver: Receiver, stream: bool) -> None:
    """As the GenAI conventions have it: the prompt's tokens include those read and created."""
    tools = [{"name": "look", "description": text(f"look {stream}", 200), "input_schema": {}}]
    body = {"model": MODEL, "max_tokens": 3, "tools": tools, "stream": stream}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    changed = body | {"tools": [tools[0] | {"description": text(f"leap {stream}", 200)}]}
    told = []
    for number, sent in enumerate((body, body, changed), 1):
        trace = f"{number:031x}{int(stream)}"
        headers = {"traceparent": f"00-{trace}-{7:016x}-01", "x-session-id": f"traced {stream}"}
        answer = keeping.post("/v1/messages", sent, NAMED_KEY, **headers)
        assert answer.status_code == 200
        if stream:
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            usage = next(e["usage"] for e in map(json.loads, lines) if e["type"] == "message_delta")
        else:
            usage = answer.json()["usage"]
        (span,) = receiver.spans(of_trace(trace), 1)
        assert (span.name, span.parent_id) == ("llm_request", f"{7:016x}")
        whole, read, created, output = usage_of(span)
        assert (read, created) == (
            usage["cache_read_input_tokens"],
            usage["cache_creation_input_tokens"],
        )
        assert whole == usage["input_tokens"] + read + created
        assert whole == span.attributes["gen_ai.usage.prompt_tokens"]
        # The model may end its answer earlier.
        assert 0 < output == usage["output_tokens"] <= 3
        assert span.attributes["cachescope.uncached.tokens"] == usage["input_tokens"]
        assert span.attributes["cachescope.org"] == "name:named"
        # As long as vLLM says that the request took, whenever the span was sent.
        took_s = (span.end_ns - span.start_ns) / 1e9
        assert took_s == pytest.approx(span.attributes["gen_ai.latency.e2e"], abs=0.2)
        told.append(span.attributes)
    first, second, third = told
    assert (
        first["cachescope.created.5m.tokens"] == first["gen_ai.usage.cache_creation.input_tokens"]
    )
    assert second["cachescope.read.device.tokens"] > 0
    assert second["cachescope.expected"] is True
    assert third["cachescope.cause"] == "tools_changed"
    assert third["cachescope.path"] == "tools[0]" and third["cachescope.expected"] is False
    assert third["cachescope.missed.tokens"] > 0


def test_several_prompts_and_samples_count_each_prompt_once(
    keeping: Api, receiver: Receiver
) -> None:
    trace = f"{9:032x}"
    prompts = [text("one of two", 60), text("two of two", 60)]
    body = {"model": MODEL, "prompt": prompts, "max_tokens": 2, "n": 2}
    headers = {"traceparent": f"00-{trace}-{7:016x}-01"}
    used = keeping.post("/v1/completions", body, NAMED_KEY, **headers).json()["usage"]
    spans = receiver.spans(of_trace(trace), 4)
    told = [usage_of(span) for span in spans if "gen_ai.usage.input_tokens" in span.attributes]
    assert len(told) == 2
    assert sum(whole for whole, *_ in told) == used["prompt_tokens"]
    assert sum(output for *_, output in told) == used["completion_tokens"]


def test_a_request_that_is_cut_off_has_a_span_of_ours(keeping: Api, receiver: Receiver) -> None:
    trace = f"{10:032x}"
    body = {"model": MODEL, "prompt": text("cut", 60), "max_tokens": 2000, "stream": True}
    headers = {"x-api-key": NAMED_KEY, "traceparent": f"00-{trace}-{7:016x}-01"}
    url = f"{keeping.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    (span,) = receiver.spans(of_trace(trace), 1)
    assert (span.name, span.parent_id) == ("cachescope_request", f"{7:016x}")
    whole, read, created, output = usage_of(span)
    assert whole > read + created and output > 0
