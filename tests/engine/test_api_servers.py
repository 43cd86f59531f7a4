"""Two API processes in front of two engines: metrics add up, purges reach all of them, and what one
of them cannot know it says."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from tests.engine.bodies import EPHEMERAL, agent_body, session
from tests.engine.ledgers import agreed, reading
from tests.engine.server import NAMED_KEY, OPERATOR_TOKEN, SMALL, Api, serve_scoped
from vllm_cachescope.usage.tables import REQUESTS

pytestmark = pytest.mark.engine

TWO = ("--api-server-count", "2", "--data-parallel-size", "2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "of two"


@pytest.fixture(scope="module")
def api(tiny_model, tmp_path_factory, directory: Path) -> Iterator[Api]:
    scratch = tmp_path_factory.mktemp("processes")
    # As a user does: which metrics add up is settled when their library is imported.
    own = {"as_user": True, "module": "tests.engine.vllm_cli", "org_label": True}
    own["ledger"] = {"directory": str(directory)}
    with serve_scoped(tiny_model, scratch, *SMALL, *TWO, **own) as api:
        yield api


@pytest.fixture(scope="module")
def processes(api: Api) -> Iterator[dict[int, httpx.Client]]:
    """A connection to each API process, by its rank."""
    found: dict[int, httpx.Client] = {}
    for _ in range(200):
        client = httpx.Client(base_url=api.url, headers={"x-api-key": NAMED_KEY}, timeout=60)
        rank = listed(client)["api_process"]
        if found.setdefault(rank, client) is not client:
            client.close()
        if len(found) == 2:
            break
    assert sorted(found) == [0, 1]
    yield found
    for client in found.values():
        client.close()


def listed(client: httpx.Client) -> Any:
    answer = client.get("/cachescope/breaks").raise_for_status().json()
    assert answer["api_processes"] == 2
    return answer


def message(client: httpx.Client, body: dict[str, Any], name: str) -> Any:
    answer = client.post("/v1/messages", json=body, headers=session(name))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_metrics_add_up(api: Api, processes: dict[int, httpx.Client]) -> None:
    answers = [
        message(client, agent_body("metrics", temperature=0), f"{rank} {turn}")
        for turn in range(4)
        for rank, client in processes.items()
    ]
    nobody = api.post("/v1/messages", agent_body("nobody's metrics", temperature=0), key=None)
    answers.append(nobody.raise_for_status().json())
    assert len({answer["content"][0]["text"] for answer in answers[:-1]}) == 1
    told = Counter()
    for answer in answers:
        usage = answer["usage"]
        told["read"] += usage["cache_read_input_tokens"]
        told["created"] += usage["cache_creation_input_tokens"]
        told["uncached"] += usage["input_tokens"]
    assert told["read"] > told["created"] > 0

    def counted() -> Counter[str]:
        kinds: Counter[str] = Counter()
        samples = api.metrics("cachescope_prompt_tokens_total", "outcome")
        for (outcome,), tokens in samples.items():
            kinds["read" if outcome.startswith("read_") else outcome] += tokens
        return kinds

    await_equal(counted, told)
    assert api.metrics("vllm:prompt_tokens_total").total() == told.total()

    # Each request once, whichever process had it, under the engine and the organisation it was.
    totals = {"query_tokens_total": told.total(), "hit_tokens_total": told["read"]}
    for name, total in totals.items():
        assert api.metrics(f"cachescope_{name}", "engine").total() == total
    requests = api.metrics("cachescope_requests_total", "engine", "org")
    orgs = Counter(org for _, org in requests.elements())
    assert orgs == {"name:named": len(answers) - 1, "other": 1}
    assert {engine for engine, _ in requests} == {"0", "1"}
    costs = api.metrics("cachescope_input_cost_tokens_total", "caching")
    assert costs["without",] == told.total()
    stages = api.metrics("cachescope_stage_seconds_count", "stage", "engine")
    planned = sum(count for (stage, _), count in stages.items() if stage == "plan")
    assert planned == len(answers)
    assert {engine for _, engine in stages} == {"0", "1"}

    def used() -> Counter[tuple[str, str]]:
        return api.metrics("cachescope_tier_used_bytes", "engine", "tier")

    tiers = httpx.get(f"{api.url}/cachescope/health", timeout=60).json()["tiers"]
    expected = Counter({(str(t["engine"]), t["name"]): t["used_bytes"] for t in tiers})
    await_equal(used, +expected)
    text = httpx.get(f"{api.url}/metrics", timeout=60).text
    own = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("cachescope_")
    ]
    assert own and not any("pid" in sample.labels for sample in own)
    capacity = [s.labels["engine"] for s in own if s.name == "cachescope_tier_capacity_bytes"]
    assert sorted(capacity) == ["0", "0", "1", "1"]


def test_what_another_process_had_is_known(processes: dict[int, httpx.Client]) -> None:
    first = message(processes[0], agent_body("compared"), "compared")
    time.sleep(0.5)
    asked = {"diagnostics": {"previous_message_id": first["id"]}}
    assert message(processes[1], agent_body("compared") | asked, "compared")["diagnostics"] is None
    changed = agent_body("compared", "Weighs anything.") | asked
    reason = message(processes[1], changed, "compared")["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "tools_changed"
    # What nobody has had may have been another server's.
    unknown = agent_body("compared") | {"diagnostics": {"previous_message_id": "msg_unknown"}}
    reason = message(processes[1], unknown, "compared")["diagnostics"]["cache_miss_reason"]
    assert reason == {"type": "unavailable"}


def test_a_purge_reaches_all_processes(processes: dict[int, httpx.Client]) -> None:
    for rank, client in processes.items():
        for description in ("Weighs.", "Weighs anything."):
            body = agent_body("purged", description)
            body["messages"][0]["content"][0]["cache_control"] = EPHEMERAL
            message(client, body, f"purged {rank}")
        assert listed(client)["breaks"]
    what = {"org": "named"}
    operator = {"x-api-key": OPERATOR_TOKEN}
    processes[0].post("/cachescope/purge", json=what, headers=operator).raise_for_status()
    assert not listed(processes[0])["breaks"]
    await_equal(lambda: listed(processes[1])["breaks"], [])


def await_equal(find: Any, expected: Any) -> None:
    """Wait some seconds until ``find`` returns what is expected."""
    deadline = time.monotonic() + 15
    while (found := find()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected


def test_both_write_one_ledger(
    api: Api, processes: dict[int, httpx.Client], directory: Path
) -> None:
    for turn in range(3):
        for rank, client in processes.items():
            message(client, agent_body("ledger", temperature=0), f"ledger {rank} {turn}")
    agreed(api, directory)
    with reading(directory) as connection:
        assert set(connection.execute(select(REQUESTS.c.engine)).scalars()) == {0, 1}
    # Either process answers for both.
    answers = [
        client.get("/cachescope/usage", params={"by": "session"}).json()["total"]
        for client in processes.values()
    ]
    assert answers[0] == answers[1]
    assert answers[0]["requests"] >= 6
