from dataclasses import replace
from types import MappingProxyType

import pytest

from vllm_cachescope.api.recorder import Recorder
from vllm_cachescope.api.request_context import PromptTiming, RequestContext
from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind, Divergence
from vllm_cachescope.tenancy.scope import MAX_NAME, Caller, Scope
from vllm_cachescope.usage.record import RequestRecord

REPORT = Report(
    (Row("read_cpu", Scope.ORG, 300, 32), Row("uncached", Scope.ORG, 300, 5)),
    engine=EngineId(1, "an epoch"),
    prefill_seconds_saved=0.5,
)
DIAGNOSIS = Diagnosis(
    kind=DiagnosisKind.TOOLS_CHANGED,
    expected=False,
    where=Divergence("tools", "tools[7]", 12),
    changes=(),
    shared_tokens=32,
    missed_tokens=100,
    prompt_tokens=37,
    uncached=(),
    engine=(CacheMiss(MissCause.EXPIRED, 10), CacheMiss(MissCause.PARTIAL_BLOCK, 3)),
    lineage=4,
    measured=True,
)


class Records:
    def __init__(self) -> None:
        self.seen: list[RequestRecord] = []
        self.recorder = Recorder("served", "replica a", lambda: 5.0)
        self.recorder.add_sink(lambda record, _: self.seen.append(record))

    def of(self, context: RequestContext, diagnosis: Diagnosis | None = None) -> RequestRecord:
        self.recorder.record(context, diagnosis, "chatcmpl-1")
        return self.seen[-1]


@pytest.fixture
def records() -> Records:
    return Records()


def context(**reports: Report) -> RequestContext:
    return RequestContext(Caller("name:acme", "s"), reports=reports)


def test_prompts_of_one_request_are_one_record(records: Records) -> None:
    asked = context(a=REPORT, b=replace(REPORT, prefill_seconds_saved=0.25))
    asked.untold["c"] = replace(REPORT, prefill_seconds_saved=None)
    asked.timings = {
        "a": PromptTiming([1], 0, 0, 10.0, 10.5),
        "b": PromptTiming([1], 0, 0, 10.0, 10.75, output_tokens=7),
    }
    made = records.of(asked)
    assert (made.at, made.org, made.session, made.model) == (5.0, "name:acme", "s", "served")
    assert (made.replica, made.engine, made.request_id) == ("replica a", 1, "chatcmpl-1")
    assert (made.read_by_tier, made.uncached_tokens) == ({"cpu": 96}, 15)
    assert (made.output_tokens, made.prefill_seconds_saved, made.ttft_s) == (7, 0.75, 0.75)
    assert made.cause is made.region is None


def test_a_break(records: Records) -> None:
    made = records.of(context(a=REPORT), DIAGNOSIS)
    assert (made.lineage, made.cause, made.expected) == (4, "tools_changed", False)
    assert (made.region, made.path) == ("tools", "tools[7]")
    assert made.missed_tokens == 110  # but for what nobody can do anything about
    assert made.is_break


def test_what_is_no_break_has_no_place(records: Records) -> None:
    fork = replace(DIAGNOSIS, kind=DiagnosisKind.FORK, expected=True)
    made = records.of(context(a=REPORT), fork)
    assert (made.region, made.path, made.is_break) == (None, None, False)


def test_an_estimate_names_no_engine_and_no_cause(records: Records) -> None:
    estimated = replace(REPORT, engine=None, prefill_seconds_saved=None)
    made = records.of(context(a=estimated), replace(DIAGNOSIS, measured=False))
    assert (made.engine, made.cause, made.prefill_seconds_saved) == (None, None, None)


def test_a_clients_names_are_cut(records: Records) -> None:
    deep = Divergence("messages", "messages" + "[0]" * 500, 1)
    made = records.of(context(a=REPORT), replace(DIAGNOSIS, where=deep))
    assert made.path is not None and len(made.path) == MAX_NAME


def test_what_no_engine_had_is_not_recorded(records: Records) -> None:
    records.recorder.record(context(), None, None)
    assert not records.seen


def test_a_mistake_costs_the_record_only(records: Records) -> None:
    broken = context(a=REPORT)
    broken.timings = MappingProxyType({"a": None})  # type: ignore[dict-item, assignment]
    records.recorder.record(broken, None, None)
    assert not records.seen
    late: list[RequestRecord] = []
    records.recorder.add_sink(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    records.recorder.add_sink(lambda record, _: late.append(record))
    records.of(context(a=REPORT))
    assert late == records.seen
