"""What a real server's metrics say of real requests is what their replies say."""

import time
from collections import Counter

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from demo.session import agent_session
from tests.engine.bodies import EPHEMERAL, HOUR, agent_body, block, session
from tests.engine.server import MODEL, Api, breaks
from vllm_cachescope.diagnosis.outcome import UNAVOIDABLE
from vllm_cachescope.metrics import (
    HIT_TOKENS,
    INPUT_COST,
    LOST_TOKENS,
    PREFILL_SECONDS_SAVED,
    QUERY_TOKENS,
    QUEUED_DIAGNOSES,
    REQUESTS,
    STAGE_SECONDS,
    TOKENIZED_TOKENS,
    Metric,
)

pytestmark = pytest.mark.engine

Values = dict[tuple[str, ...], float]


def values(api: Api, metric: Metric, suffix: str = "") -> Values:
    """Return what a metric shows, by the values of its own labels: of the engine, and of requests
    that no engine had."""
    text = httpx.get(f"{api.url}/metrics", timeout=60).text
    shown: Counter[tuple[str, ...]] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == metric.shown + suffix:
                shown[tuple(sample.labels[label] for label in metric.labels)] += sample.value
    return dict(shown)


def grown(api: Api, metric: Metric, before: Values, suffix: str = "") -> Values:
    now = values(api, metric, suffix)
    changes = {key: value - before.get(key, 0.0) for key, value in now.items()}
    return {key: change for key, change in changes.items() if change}


def body(name: str, question: str) -> dict:
    return {
        "model": MODEL,
        "max_tokens": 2,
        "system": [
            block(f"{name}, for long", 300, cache_control=HOUR),
            block(f"{name}, for short", 300, cache_control=EPHEMERAL),
        ],
        "messages": [{"role": "user", "content": [block(question, 100)]}],
    }


def test_requests_costs_and_savings_are_those_of_the_replies(api: Api) -> None:
    counted = (REQUESTS, QUERY_TOKENS, HIT_TOKENS, INPUT_COST, PREFILL_SECONDS_SAVED)
    before = {metric: values(api, metric) for metric in counted}
    usages = []
    for question in ("one", "two", "two", "three"):
        if question == "three":
            api.empty_device()
        answer = api.post("/v1/messages", body("priced", question)).raise_for_status()
        usages.append(answer.json()["usage"])
    tiny = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi."}]}
    usages.append(api.post("/v1/messages", tiny).raise_for_status().json()["usage"])

    read = sum(usage["cache_read_input_tokens"] for usage in usages)
    fresh = sum(usage["input_tokens"] for usage in usages)
    created = [
        sum(usage["cache_creation"][f"ephemeral_{ttl}_input_tokens"] for usage in usages)
        for ttl in ("5m", "1h")
    ]
    prompts = read + fresh + sum(created)
    assert read > 0 and all(created)

    def seen() -> Values:
        return grown(api, QUERY_TOKENS, before[QUERY_TOKENS])

    # The engine tells the API process a step later.
    deadline = time.monotonic() + 15
    while seen() != {(): prompts} and time.monotonic() < deadline:
        time.sleep(0.1)
    found = {metric: grown(api, metric, before[metric]) for metric in counted}
    assert found[REQUESTS] == {("created",): 1, ("read",): 3, ("neither",): 1}
    assert found[QUERY_TOKENS] == {(): prompts}
    assert set(found[HIT_TOKENS]) == {("device",), ("cpu",)}
    assert sum(found[HIT_TOKENS].values()) == read
    cost = fresh + 0.1 * read + 1.25 * created[0] + 2 * created[1]
    assert found[INPUT_COST] == pytest.approx({("without",): prompts, ("with",): cost})
    saved_s = found[PREFILL_SECONDS_SAVED]
    assert set(saved_s) == set(found[HIT_TOKENS])
    # At one rate: what was read from either tier saved as much for each token.
    rates = [found[HIT_TOKENS][tier] / saved_s[tier] for tier in saved_s]
    assert all(100 < rate < 1_000_000 for rate in rates)


def test_a_break_costs_what_the_list_of_breaks_says(api: Api) -> None:
    key, before = "key of the lossy", values(api, LOST_TOKENS)
    for tool in ("Weighs things.", "Weighs anything."):
        api.post("/v1/messages", agent_body("lossy", tool), key, **session("lossy"))
    (seen,) = breaks(api, key)
    misses = [miss for miss in seen["engine"] if miss["cause"] not in UNAVOIDABLE]
    tokens = seen["missed_tokens"] + sum(miss["tokens"] for miss in misses)
    assert seen["missed_tokens"] > 0
    assert grown(api, LOST_TOKENS, before) == {("tools_changed", "tools", "false"): tokens}


def test_what_was_tokenised_is_told_from_what_was_known(api: Api) -> None:
    """And the usage is that of the whole prompts."""
    before, prompt_tokens = values(api, TOKENIZED_TOKENS), 0
    conversation = agent_session(11, turns=6, tools=2, rules=4)
    for turn in range(6):
        body = {"model": MODEL, "max_tokens": 1, **conversation.body(turn)}
        reply = api.post("/v1/messages", body, "key of the known", **session("known"))
        used = reply.json()["usage"]
        prompt_tokens += (
            used["input_tokens"]
            + used["cache_read_input_tokens"]
            + used["cache_creation_input_tokens"]
        )
    found = grown(api, TOKENIZED_TOKENS, before)
    assert found[("known",)] + found[("new",)] == prompt_tokens
    # Of the first turn nothing, of each later one what the turn before had.
    assert 0.6 < found[("known",)] / prompt_tokens < 0.9


@pytest.mark.parametrize("scope", ["session", "org"])
def test_what_was_tokenised_is_known_to_those_alone_who_may_read_the_prompt(
    api: Api, scope: str
) -> None:
    """Whose prompt was here before, nobody else can tell by the time that tokenising takes."""
    body = {"model": MODEL, "max_tokens": 1, **agent_session(12, 3, 2, 4).body(2)}
    body["messages"][-1]["content"][-1]["cache_control"] = {**EPHEMERAL, "scope": scope}
    key, other = f"key of the {scope}", f"another than that of the {scope}"
    known = []
    for asked_by, said in (
        (key, session("one")),
        (key, session("one")),
        (key, session("two")),
        (key, {}),
        (key, {}),
        (other, session("one")),
    ):
        before = values(api, TOKENIZED_TOKENS)
        api.post("/v1/messages", body, asked_by, **said).raise_for_status()
        known.append(("known",) in grown(api, TOKENIZED_TOKENS, before))
    of_org = scope == "org"
    assert known == [False, True, of_org, of_org, of_org, False]


def test_each_stage_of_a_request_is_timed(api: Api) -> None:
    before = values(api, STAGE_SECONDS, "_count")
    times = values(api, STAGE_SECONDS, "_sum")
    for turn in range(3):
        api.post("/v1/messages", agent_body(f"staged {turn}")).raise_for_status()
    found = grown(api, STAGE_SECONDS, before, "_count")
    assert found == {("plan",): 3, ("boundaries",): 3, ("diagnosis",): 3}
    took = grown(api, STAGE_SECONDS, times, "_sum")
    assert all(0 < seconds < 3 for seconds in took.values())
    assert values(api, QUEUED_DIAGNOSES) == {(): 0}
