"""An agents' load: many clones of recorded sessions at once, no two of them alike."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.simulation.traced_request import TracedRequest


@dataclass(frozen=True, slots=True)
class AgentLoad:
    """How clones are run.

    Attributes:
        agents: how many run at once; where one ends another begins.
        sessions: how many run in all.
        pause_chance: how often a human pauses before the next request, from 0 to 1.
        pause_s: the mean of such a pause, in seconds.
        breaks_off: how many sessions end in the middle of a call of a tool, from 0 to 1.
    """

    agents: int
    sessions: int
    pause_chance: float = 0.0
    pause_s: float = 0.0
    breaks_off: float = 0.1


def agent_load(
    recorded: Sequence[Sequence[TracedRequest]], load: AgentLoad, rng: random.Random
) -> list[TracedRequest]:
    """Return the requests of clones of ``recorded`` sessions, in order of time.

    A clone has blocks of its own, but for those that several sessions were recorded with. It ends
    at a turn that is drawn, and so are its gaps: what is learned of one clone says nothing for
    certain about the next.

    Args:
        recorded: sessions, each in order of time.
        load: how many of them, and how.
        rng: draws them.
    """
    users = Counter(
        key for session in recorded for key in {key for one in session for key in one.keys}
    )
    common = {key for key, sessions in users.items() if sessions > 1}
    found: list[TracedRequest] = []
    paused: set[int] = set()
    running: list[tuple[float, int, Iterator[TracedRequest]]] = []
    started = 0

    def start(at: float) -> None:
        nonlocal started
        if started < load.sessions:
            clone = _clone(rng.choice(recorded), started, at, load, common, rng, paused)
            first = next(clone)
            found.append(first)
            heappush(running, (first.at, started, clone))
            started += 1

    for _ in range(load.agents):
        start(rng.uniform(0, 60))
    while running:
        at, number, clone = heappop(running)
        request = next(clone, None)
        if request is None:
            start(at + rng.uniform(1, 5))
        else:
            found.append(request)
            heappush(running, (request.at, number, clone))
    return _with_endings(sorted(found, key=lambda request: request.at), paused, load)


def live_blocks(requests: Sequence[TracedRequest], agents: int) -> int:
    """Return how many distinct blocks the sessions that run at once have, on average over their
    requests; sessions are told apart by `TracedRequest.org`."""
    blocks: dict[str, set[bytes]] = {}
    last = {request.org: number for number, request in enumerate(requests)}
    total = held = 0
    for number, request in enumerate(requests):
        own = blocks.setdefault(request.org, set())
        held -= len(own)
        own.update(request.keys)
        held += len(own)
        total += held
        if last[request.org] == number:
            held -= len(blocks.pop(request.org))
    assert len(blocks) <= agents
    return total // max(1, len(requests))


def _clone(
    session: Sequence[TracedRequest],
    number: int,
    at: float,
    load: AgentLoad,
    common: set[bytes],
    rng: random.Random,
    paused: set[int],
) -> Iterator[TracedRequest]:
    pace = rng.lognormvariate(0, 0.4)
    before = session[0].at
    for request in session[: rng.randint(max(1, len(session) // 2), len(session))]:
        at += (request.at - before) * pace * rng.lognormvariate(0, 0.4)
        before = request.at
        is_after_pause = rng.random() < load.pause_chance
        if is_after_pause:
            at += rng.expovariate(1 / load.pause_s)
        keys = tuple(key if key in common else key + b"%d" % number for key in request.keys)
        made = replace(request, at=at, keys=keys, org=f"agent {number}")
        if is_after_pause:
            paused.add(id(made))
        yield made


def _with_endings(
    requests: list[TracedRequest], paused: set[int], load: AgentLoad
) -> list[TracedRequest]:
    """Return the requests with how their answers ended: in a call of a tool where the session goes
    on from there without a human's pause, and in some sessions at the end."""
    rng = random.Random(0)
    following: dict[str, TracedRequest] = {}
    marked: list[TracedRequest] = []
    for request in reversed(requests):
        then = following.get(request.org)
        following[request.org] = request
        if then is None:
            waits = rng.random() < load.breaks_off
        else:
            waits = id(then) not in paused and then.keys[: len(request.keys)] == request.keys
        signals = replace(request.signals, ended=Ended.TOOLS if waits else Ended.ANSWER)
        marked.append(replace(request, signals=signals))
    return marked[::-1]
