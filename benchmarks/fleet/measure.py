"""Measuring: fleets are started one after the other, and each row's router is put in front."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from transformers import AutoTokenizer

from benchmarks.agent_load import Call
from benchmarks.fleet import load
from benchmarks.fleet.drive import Asking, asking, drive
from benchmarks.fleet.engine import FrontEnd, Tiers
from benchmarks.fleet.replica import replicas
from benchmarks.fleet.router import Choices, Router, dynamo_plane, routed, tenant_fields
from benchmarks.fleet.row import Row
from benchmarks.fleet.run import Run
from benchmarks.fleet.size import Size
from benchmarks.fleet.tenants import read_across
from demo.client import empty_device_cache
from demo.server import Server, ServerFailed
from tests.redis.servers import RedisServer

SEED = 0
"""Of what clients draw who choose replicas themselves."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every row gets.

    Attributes:
        size: of the replicas.
        calls: the sessions.
        pace: what pauses are multiplied with.
    """

    size: Size
    calls: Sequence[Sequence[Call]]
    pace: float


def measure(
    rows: Sequence[Row], plan: Plan, recorded: dict[Router, Choices]
) -> Iterator[tuple[Row, Run | str]]:
    """Yield each row with what was measured, or with why it was not.

    Args:
        rows: the rows.
        plan: what each of them gets.
        recorded: what routers chose for plain vLLM, to be chosen once more; what is not in it is
            put there.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(plan.size.model))
    for _, numbered in groupby(enumerate(rows), _fleet):
        members = list(numbered)
        missing = members[0][1].missing
        if members[0][1].engine.front_end is FrontEnd.PYTHON:
            missing = []
        if missing:
            yield from ((row, absent(row)) for _, row in members)
            continue
        done: set[int] = set()
        try:
            for number, measured in _measured(members, plan, tokenizer, recorded):
                done.add(number)
                yield rows[number], measured
        except (ServerFailed, RuntimeError, httpx.HTTPError) as error:
            why = "failed: " + str(error).replace("\n", " ")[:300]
            notes = "\n".join(getattr(error, "__notes__", ()))
            print(f"{why}\n{notes}", flush=True)
            yield from ((row, why) for number, row in members if number not in done)


def absent(row: Row) -> str:
    """Return how the table says that what a row needs is not installed."""
    return f"not installed: {', '.join(row.missing)}"


def _fleet(numbered: tuple[int, Row]) -> tuple[object, ...]:
    """Return what is equal for rows that one fleet serves. Only vLLM's server in Python can be
    emptied from outside, with its tiers; others are started anew."""
    number, row = numbered
    emptied = row.engine.front_end is FrontEnd.PYTHON
    return row.engine, row.replicas, None if emptied else number


@dataclass(frozen=True, slots=True)
class _Fleet:
    """What runs.

    Attributes:
        replicas: the replicas.
        redis: the Redis behind them, if they use it.
        size: of a replica.
        plane: the variables by which Dynamo's parts find each other.
    """

    replicas: Sequence[Server]
    redis: RedisServer
    size: Size
    plane: dict[str, str]


def _measured(
    rows: Sequence[tuple[int, Row]],
    plan: Plan,
    tokenizer: Any,
    recorded: dict[Router, Choices],
) -> Iterator[tuple[int, Run | str]]:
    first = rows[0][1]
    size = plan.size if first.replicas > 1 else plan.size.times(2)
    with ExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="fleet-"))
        redis = stack.enter_context(closing(RedisServer(Path(directory))))
        plane = stack.enter_context(dynamo_plane())
        running = stack.enter_context(replicas(first.engine, first.replicas, size, redis, plane))
        fleet = _Fleet(running, redis, size, plane)
        for number, row in rows:
            if row.missing:
                yield number, absent(row)
                continue
            replayed = recorded.get(row.router) if row.replays else None
            if row.replays and replayed is None:
                yield number, "not run: what the router chose for plain vLLM was not recorded"
                continue
            if row.engine.front_end is FrontEnd.PYTHON:
                _empty(fleet)
            with routed(row.router, running, size, plane, SEED, replayed) as choose:
                # SMG takes marks out of messages; who goes its ways is to say the same.
                has_marks = row.engine.front_end is FrontEnd.PYTHON and not row.replays
                ask = asking(row.engine.front_end, has_marks, choose)
                run = _row(f"{number:03d}", row, plan, fleet, ask, tokenizer)
            if not row.engine.plugin and run.chosen:
                recorded.setdefault(row.router, run.chosen)
            yield number, run


def _empty(fleet: _Fleet) -> None:
    for replica in fleet.replicas:
        empty_device_cache(replica.url, connector=True)
    fleet.redis.client.flushall()


def _row(label: str, row: Row, plan: Plan, fleet: _Fleet, ask: Asking, tokenizer: Any) -> Run:
    prompts = load.prompts(plan.calls, label, plan.pace, fleet.size.longest, tokenizer)
    front_end = row.engine.front_end
    counted = row.engine.plugin and front_end is FrontEnd.PYTHON
    before = _asked_of_redis(fleet) if counted else Counter()
    answered = _answered(fleet, front_end)
    empty = _redis_bytes(fleet)
    outcome = drive(prompts, ask)
    asked = _asked_of_redis(fleet) - before if counted else Counter()
    after = _answered(fleet, front_end)
    # A salt keeps tenants apart for plain vLLM, too.
    apart = bool(tenant_fields(front_end, "any")[1]) or front_end is FrontEnd.DYNAMO
    stored = _redis_bytes(fleet) - empty
    own = across = None
    if row.engine.plugin and front_end is not FrontEnd.GRPC:
        own, across = read_across(ask, label)
    return Run(
        **asdict(outcome),
        chosen=_choices(ask, fleet.replicas, outcome.reads),
        first_time=load.first_time(prompts, apart),
        asked_of_redis=dict(asked),
        split=tuple(late - early for late, early in zip(after, answered, strict=True)),
        redis_bytes=stored if row.engine.tiers is Tiers.REDIS else None,
        own=own,
        across=across,
        load_average=os.getloadavg()[0],
    )


def _choices(
    ask: Asking, running: Sequence[Server], sessions: Mapping[str, Sequence[int]]
) -> Choices:
    """Return which replica answered each call, as far as the router has said so.

    Args:
        ask: what put the calls.
        running: the replicas.
        sessions: something of each session's calls.
    """
    places = {replica.url.partition("://")[2]: number for number, replica in enumerate(running)}
    told = {call: places.get(url.partition("://")[2]) for call, url in ask.routed.items()}
    if all(place is None for place in told.values()):
        return {}
    return {
        session: [told.get((session, number)) for number in range(len(calls))]
        for session, calls in sessions.items()
    }


def _redis_bytes(fleet: _Fleet) -> int:
    return int(fleet.redis.client.info("memory")["used_memory"])


def _answered(fleet: _Fleet, front_end: FrontEnd) -> list[int]:
    """Return how many calls each replica has answered, where its port tells."""
    if front_end not in (FrontEnd.PYTHON, FrontEnd.RUST):
        return []
    samples = [list(_samples(replica)) for replica in fleet.replicas]
    return [
        sum(int(one.value) for one in told if one.name == "vllm:request_success_total")
        for told in samples
    ]


def _asked_of_redis(fleet: _Fleet) -> Counter[str]:
    counted: Counter[str] = Counter()
    for replica in fleet.replicas:
        for sample in _samples(replica):
            if sample.name == "cachescope_tier_keys_total":
                what = f"{sample.labels['operation']} {sample.labels['outcome']}"
                counted[what] += int(sample.value)
    return counted


def _samples(replica: Server) -> Iterator[Sample]:
    text = httpx.get(f"{replica.url}/metrics", timeout=60).text
    for family in text_string_to_metric_families(text):
        yield from family.samples
