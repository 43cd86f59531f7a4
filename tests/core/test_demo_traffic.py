"""The demo's agents: what each of them does to its prefix, as the diagnosis sees it."""

import itertools
from collections import defaultdict

from prometheus_client import CollectorRegistry

from demo.session import to_chat
from demo.traffic import TURNS, steps
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import READERS

SECRET = b"a secret of the tests"


def test_each_agent_breaks_its_prefix_as_it_says():
    diagnoser = Diagnoser(SECRET, 16, registry=CollectorRegistry())
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    lineages: defaultdict[str, set[int]] = defaultdict(set)
    for step in steps(iter(range(1))):
        protocol = Protocol.MESSAGES if step.client == "anthropic" else Protocol.CHAT
        body = {"model": "demo", "max_tokens": 8} | (
            step.body if protocol is Protocol.MESSAGES else to_chat(step.body)
        )
        request = READERS[protocol](body, (300, 3600))
        caller = Caller(step.org, step.session)
        pending = diagnoser.open(caller, request, body, {})
        diagnoser.close(pending, [], f"id {len(kinds[step.session])} {step.session}")
        kinds[step.session].append(str(pending.diagnosis.kind))
        lineages[step.session].add(pending.diagnosis.lineage)
    assert set(kinds) == {"planner-1", "night-desk-1", "pilot-office-1", "customs-1"}
    goes_on = ["continuation"] * (TURNS - 1)
    assert kinds["night-desk-1"] == ["first_request", *goes_on[:5], "tools_changed", *goes_on[6:]]
    assert kinds["pilot-office-1"].count("system_changed") == 2
    assert kinds["customs-1"].count("context_compacted") == 1
    assert not any(kind.endswith("_changed") for kind in kinds["planner-1"])
    assert len(lineages["planner-1"]) > 1  # Those of its subagents.


def test_rounds_go_on_with_other_conversations():
    sessions = [step.session for step in itertools.islice(steps(), 200)]
    assert {"planner-1", "planner-2"} <= set(sessions)
    first, *others = (step.body["messages"] for step in itertools.islice(steps(), 4))
    assert first not in others
