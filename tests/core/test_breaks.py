"""Diagnoser and BreakLog on the API's side: what is recorded, for whom, and what clients are
answered."""

import copy
import io
import json
import logging
from typing import Any

import pytest
from anthropic.types import Diagnostics
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter

from demo.session import agent_session
from vllm_cachescope.api import break_log
from vllm_cachescope.api.break_log import LISTED_CHANGES
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.pending_diagnosis import PendingDiagnosis
from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS

ENGINE = EngineId(0, "epoch")
ACME, OTHER = Caller("acme", "s"), Caller("other", "s")
SESSION = agent_session(1, turns=4, tools=6, rules=4)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def diagnoser(registry: CollectorRegistry) -> Diagnoser:
    return Diagnoser(b"sixteen bytes or so", 16, lambda: 0.0, lambda: 5.0, registry=registry)


def body(turn: int, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 5, **SESSION.body(turn), **fields}


def ask(
    diagnoser: Diagnoser,
    given: dict[str, Any],
    caller: Caller = ACME,
    read: int = 0,
    miss: CacheMiss | None = None,
    response_id: str | None = None,
    prompt: int = 6400,
) -> PendingDiagnosis:
    """Put a request through, of whose ``prompt`` tokens the engine read the first ``read``."""
    protocol = Protocol.MESSAGES if "max_tokens" in given else Protocol.RESPONSES
    request = READERS[protocol](given, (300, 3600))
    reports: dict[str, Report] = {}
    pending = diagnoser.open(caller, request, given, {}, reports)
    rows = (
        Row("read_device", Scope.ORG, 300, read),
        Row("created", Scope.ORG, 300, prompt - read),
    )
    reports["nonce"] = Report(rows, (miss,) if miss else (), engine=ENGINE)
    diagnoser.close(pending, reports.values(), response_id)
    return pending


def counted(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for metric in registry.collect()
        if metric.name == name
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def test_a_healthy_session_is_quiet(diagnoser: Diagnoser) -> None:
    ask(diagnoser, body(0), prompt=5600)
    for turn in (1, 2, 3):
        ask(diagnoser, body(turn), prompt=5600 + 400 * turn, read=5600 + 400 * (turn - 1))
    assert diagnoser.breaks.recent(None) == []


def test_a_changed_tool_is_a_break_with_its_name(
    diagnoser: Diagnoser, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    ask(diagnoser, body(1))
    changed = body(2)
    changed["tools"][3]["description"] += " Updated."
    ask(diagnoser, changed, read=640)
    (seen,) = diagnoser.breaks.recent("acme")
    assert seen.diagnosis.kind == "tools_changed" and not seen.diagnosis.expected
    assert seen.diagnosis.where is not None and seen.diagnosis.where.path.startswith("tools[3]")
    assert changed["tools"][3]["name"] in seen.diagnosis.names
    assert counted(registry, "cachescope_breaks") == {
        ("", "0", "tools_changed", "tools", "false"): 1
    }
    assert "tools_changed" in caplog.text and "Updated" not in caplog.text
    assert seen.to_dict()["at"] == 5.0


def test_breaks_are_listed_for_their_organisation_newest_first(diagnoser: Diagnoser) -> None:
    for caller in (ACME, OTHER):
        ask(diagnoser, body(1), caller)
        for model in ("m2", "m3"):
            ask(diagnoser, body(1, model=model), caller)
    assert [seen.model for seen in diagnoser.breaks.recent("acme")] == ["m3", "m2"]
    assert {seen.caller.org for seen in diagnoser.breaks.recent("acme")} == {"acme"}
    assert (
        len(diagnoser.breaks.recent(None)) == 4 and len(diagnoser.breaks.recent(None, limit=3)) == 3
    )


def test_an_account_pushes_out_no_others_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_log, "REMEMBERED_BYTES", 60_000)
    listed = {"acme", "other"}
    diagnoser = Diagnoser(
        b"secret",
        16,
        registry=CollectorRegistry(),
        account_of=lambda org: org if org in listed else "unlisted",
    )

    def flip(caller: Caller, times: int) -> None:
        for i in range(times + 1):
            ask(diagnoser, {"model": f"m{i}", "input": "tide " * 100}, caller, prompt=160)

    flip(OTHER, 1)
    flip(ACME, 200)
    for i in range(200):  # Made-up keys share what one may hold.
        flip(Caller(f"key:{i}", "s"), 1)
    kept = diagnoser.breaks.recent("acme", 200)
    assert kept[0].model == "m200" and 20 < len(kept) < 200
    assert len(diagnoser.breaks.recent("other")) == 1
    assert sum(b.caller.org.startswith("key:") for b in diagnoser.breaks.recent(None, 400)) > 20


def test_a_break_lists_so_much_and_counts_the_rest(
    diagnoser: Diagnoser, caplog: pytest.LogCaptureFixture
) -> None:
    for turn in range(2):
        tools = [{"name": f"{turn}-{i}"} for i in range(40)] + [
            {"name": f"tool {i}", **{f"{i}-{j}".ljust(99): turn for j in range(15)}}
            for i in range(100)
        ]
        ask(diagnoser, body(1, tools=tools))
    (seen,) = diagnoser.breaks.recent(None)
    data = seen.to_dict()
    by_kind = {change["kind"]: change for change in data["changes"]}
    added, changed = by_kind["tools_added"], by_kind["tool_changed"]
    assert (len(data["changes"]), data["more_changes"]) == (LISTED_CHANGES, 100 - LISTED_CHANGES)
    assert (len(added["names"]), added["more_names"]) == (10, 30)
    assert (len(changed["fields"]), changed["more_fields"]) == (10, 5)
    assert "more_fields" not in added and "more_names" not in changed
    assert len(caplog.records[-1].getMessage()) < 40_000


@pytest.mark.parametrize("cause", [MissCause.EXPIRED, MissCause.EVICTED])
def test_what_the_cache_did_is_named_when_the_client_changed_nothing(
    diagnoser: Diagnoser, cause: MissCause
) -> None:
    ask(diagnoser, body(1))
    miss = CacheMiss(cause, 6272, "cpu", ttl_s=300, age_s=12.5)
    ask(diagnoser, body(2), miss=miss)
    (seen,) = diagnoser.breaks.recent("acme")
    assert seen.diagnosis.cause == cause
    assert seen.diagnosis.engine[0] == miss


def test_the_diagnostics_asked_for_are_what_the_client_expects(diagnoser: Diagnoser) -> None:
    ask(diagnoser, body(1), response_id="msg_1")
    changed = body(2, diagnostics={"previous_message_id": "msg_1"})
    changed["system"][0]["text"] += " More."
    answer = ask(diagnoser, copy.deepcopy(changed)).answer()
    parsed = TypeAdapter(Diagnostics).validate_python(answer)
    assert parsed.cache_miss_reason is not None
    assert parsed.cache_miss_reason.type == "system_changed"


def test_the_tokens_in_an_answer_are_the_engines(diagnoser: Diagnoser) -> None:
    """The prompt is estimated at several thousand tokens, and has 160."""
    ask(diagnoser, body(1), response_id="msg_1", prompt=160)
    changed = body(1, diagnostics={"previous_message_id": "msg_1"})
    changed["tools"][0]["description"] += " Updated."
    reason = ask(diagnoser, changed, prompt=160).answer(0)["cache_miss_reason"]  # type: ignore[index]
    assert reason == {"type": "tools_changed", "cache_missed_input_tokens": 144}

    said = {"model": "m", "instructions": "Be brief. " * 400, "input": "tide " * 600}
    ask(diagnoser, said, response_id="resp_1", prompt=160)
    compare = {"prompt_cache_options": {"comparison_response_id": "resp_1"}}
    changed = {**said, **compare, "input": "ebb and tide " * 200}
    answer = ask(diagnoser, changed, prompt=160, read=80).answer(80)
    assert answer is not None and answer["reason"] == "input_changed"
    reusable, missed = answer["comparison_reusable_tokens"], answer["cache_missed_tokens"]
    # 4,000 of about 7,000 characters come before the change.
    assert 80 <= reusable <= 110 and missed == 144 - reusable


def test_another_organisations_message_is_not_found(diagnoser: Diagnoser) -> None:
    ask(diagnoser, body(1), response_id="msg_1")
    asked = body(1, diagnostics={"previous_message_id": "msg_1"})
    answer = ask(diagnoser, asked, OTHER).answer()
    assert answer == {"cache_miss_reason": {"type": "previous_message_not_found"}}


def test_breaks_are_logged_where_vllm_logs(
    diagnoser: Diagnoser, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", False)
    # vLLM configures its logger when it is imported, and nobody else's.
    logging.getLogger("vllm").setLevel(logging.INFO)
    logging.getLogger("vllm").addHandler(logging.StreamHandler(log))
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    # A change that cost nothing, so that it is no warning; and a name that cannot be encoded.
    ask(diagnoser, body(1))
    ask(diagnoser, body(1, model="\ud800"), read=6400)
    (line,) = log.getvalue().splitlines()
    assert line.isascii()
    seen = json.loads(line.removeprefix("cache break "))
    assert (seen["kind"], seen["expected"]) == ("model_changed", True)
    logging.getLogger("vllm").setLevel(logging.NOTSET)  # And forget who was enabled.
