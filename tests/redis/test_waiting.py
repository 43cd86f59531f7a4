"""The Redis tier while a request waits for room to load into: it may look without loading, is not
charged for the wait, and may give up."""

import time

from tests.redis.engine_side import SLOT, EngineSide, keys
from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.tiers.inquiries import Lookup


def peek(side: EngineSide, request: str, wanted: list[bytes]) -> list[Lookup]:
    """Look for keys until the store has answered."""
    while True:
        found = [side.tier.peek(request, key) for key in wanted]
        side.tier.flush()
        if Lookup.RETRY not in found:
            return found
        time.sleep(0.001)


def test_looking_takes_no_room_of_what_may_be_loaded(server, start_engine_side):
    a = start_engine_side(server.url)
    for half in (keys(16)[:8], keys(16)[8:]):
        a.put(half)
    side = start_engine_side(server.url, inflight_bytes=10 * SLOT)
    most = side.tier.most_loads
    some = keys(16)
    assert peek(side, "r", some) == [Lookup.HIT] * 16
    assert peek(side, "r", [*some, *keys(1, "never stored")])[-1] is Lookup.MISS
    assert side.tier.load_room == most
    found = [side.tier.lookup("r", key) for key in some]
    assert found == [Lookup.HIT] * min(16, most) + [Lookup.MISS] * max(0, 16 - most)


def test_who_has_waited_for_room_still_has_its_time_for_the_tier(server, start_engine_side):
    side = start_engine_side(server.url, load_deadline_s=0.3)
    side.put(keys(4))
    peek(side, "r", keys(2))
    time.sleep(0.35)
    # Past its deadline it would be answered nothing.
    side.tier.restart("r")
    assert peek(side, "r", keys(4)) == [Lookup.HIT] * 4
    slots = [side.slot(i) for i in range(4)]
    side.tier.load(99, "r", keys(4), slots)
    assert len(side.step_until(99).loaded) == 4
    assert side.tier.usable


def test_who_gives_up_says_why(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(2))
    peek(side, "r", keys(3))
    side.tier.give_up("r", "no room in the CPU tier within 400 ms")
    assert [side.tier.lookup("r", key) for key in keys(3)] == [Lookup.MISS] * 3
    absences = [side.tier.load_failure("r", key) for key in keys(3)]
    assert absences[2] is None
    for absence in absences[:2]:
        assert absence is not None and absence.certain
        assert absence.cause is MissCause.TIMED_OUT
        assert absence.detail == "no room in the CPU tier within 400 ms"
    for gone in ("r", "never there"):
        side.tier.end_request(gone)
        side.tier.give_up(gone, "too late")
        side.tier.restart(gone)


def test_what_is_loaded_in_parts_is_asked_for_once(server, start_engine_side):
    side = start_engine_side(server.url)
    wanted = keys(6)
    side.put(wanted)
    peek(side, "r", wanted)
    side.tier.limit("r", 4)
    assert [side.tier.lookup("r", key) for key in wanted] == [Lookup.HIT] * 4 + [Lookup.MISS] * 2
    side.tier.load(98, "r", wanted[:4], [side.slot(i) for i in range(4)])
    assert len(side.step_until(98).loaded) == 4
    # Each request loads once, unless it resumes.
    assert side.tier.lookup("r", wanted[4]) is Lookup.MISS
    assert side.tier.resume("r")
    side.tier.limit("r", None)
    assert [side.tier.lookup("r", key) for key in wanted[4:]] == [Lookup.HIT] * 2
    side.tier.load(99, "r", wanted[4:], [side.slot(i) for i in range(2)])
    assert len(side.step_until(99).loaded) == 2
    asked = side.tier.take_stats()
    assert asked["lookup", "hit"] == 6 and not asked["load", "dropped"]


def test_nobody_resumes_for_whom_something_has_failed(server, start_engine_side):
    side = start_engine_side(server.url)
    wanted = keys(3)
    side.put(wanted)
    for request in ("gone", "given up"):
        peek(side, request, wanted)
    server.client.flushdb()
    assert side.tier.lookup("gone", wanted[0]) is Lookup.HIT
    side.tier.load(99, "gone", wanted[:1], [side.slot(0)])
    assert not side.step_until(99).loaded
    side.tier.give_up("given up", "no room")
    assert not any(side.tier.resume(request) for request in ("gone", "given up", "never there"))
