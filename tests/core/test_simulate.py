"""Recorded requests replayed against caches: what is counted, and how much each policy holds."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cloned_sessions import AgentLoad, agent_load, live_blocks
from tests.examples import examples
from vllm_cachescope.cache.runs import RequestSignals
from vllm_cachescope.cli.main import main
from vllm_cachescope.simulation.marked_conversations import mark_conversations
from vllm_cachescope.simulation.policies import POLICIES, make_cache
from vllm_cachescope.simulation.replay import replay
from vllm_cachescope.simulation.simulated_cache import ExpiringLru
from vllm_cachescope.simulation.traced_request import TracedRequest


def trace(seed: int, requests: int, chats: int = 12) -> list[TracedRequest]:
    """Return chats that share a first block, each of whose requests has more blocks than the one
    before."""
    rng = random.Random(seed)
    lengths = [0] * chats
    found = []
    for number in range(requests):
        chat = rng.randrange(chats)
        lengths[chat] = rng.choice((lengths[chat] + 1, lengths[chat] + 2, 1))
        keys = (b"head", *(b"%d/%d" % (chat, block) for block in range(lengths[chat])))
        signals = RequestSignals(rng.randrange(900))
        found.append(TracedRequest(number * 1.0, keys, len(keys) * 16, signals))
    return found


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(POLICIES))
def test_no_policy_exceeds_its_room_or_beats_the_optimum(
    seed: int, capacity: int, policy: str
) -> None:
    requests = trace(seed, 120)
    outcome = replay(requests, make_cache(policy, capacity, requests, 0.2), 16)
    best = replay(requests, make_cache("belady", capacity, requests, 0.2), 16)
    assert outcome.most_blocks <= capacity
    assert outcome.total.blocks == sum(len(request.keys) for request in requests)
    assert outcome.total.hit_tokens == 16 * outcome.total.hit_blocks
    if policy != "lru+ttl":
        assert outcome.total.hit_blocks <= best.total.hit_blocks


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "lru+ttl"])
def test_where_there_is_room_for_all_each_block_is_a_hit_from_its_second_use_on(policy) -> None:
    requests = trace(5, 300)
    distinct = {key for request in requests for key in request.keys}
    outcome = replay(requests, make_cache(policy, 10 * len(distinct), requests, 0.2), 16)
    assert outcome.total.hit_blocks == outcome.total.blocks - len(distinct)
    assert outcome.evictions == 0


def test_lru_is_lru_and_lifetimes_with_one_ttl_are_too() -> None:
    requests = trace(7, 400)
    kept: list[bytes] = []
    hits = 0
    for request in requests:
        leading = [key in kept for key in request.keys]
        hits += leading.index(False) if False in leading else len(leading)
        for key in reversed(request.keys):
            kept = [*[one for one in kept if one != key][-24:], key]
    for policy in ("lru", "lifetime"):
        assert replay(requests, make_cache(policy, 25, requests, 0), 16).total.hit_blocks == hits


def test_a_prefix_counts_up_to_its_first_hole() -> None:
    first = TracedRequest(0.0, (b"a", b"b", b"c"), 48)
    # The second request leaves no room for c, and uses b again without a.
    requests = [first, TracedRequest(1.0, (b"x",), 16), replace(first, at=2.0)]
    outcome = replay(requests, make_cache("lru", 3, requests, 0), 16)
    assert outcome.total.hit_blocks == 2


def test_an_lru_with_lifetimes_is_lru_until_blocks_expire() -> None:
    requests = trace(7, 400)
    plain = replay(requests, make_cache("lru", 25, requests, 0), 16)
    long = [replace(request, ttl_s=3600) for request in requests]
    assert replay(long, ExpiringLru(25), 16).total.hit_blocks == plain.total.hit_blocks
    short = [replace(request, ttl_s=1) for request in requests]
    outcome = replay(short, ExpiringLru(25), 16)
    assert outcome.total.hit_blocks == 0 < plain.total.hit_blocks


@pytest.mark.parametrize("policy", ["learned", "lifetime"])
def test_blocks_expire_as_their_requests_ask(policy) -> None:
    def read(ttl_s: int, gap: float) -> int:
        request = TracedRequest(0.0, (b"a", b"b"), 32, ttl_s=ttl_s)
        requests = [request, replace(request, at=gap)]
        return replay(requests, make_cache(policy, 10, requests, 0.2), 16).total.hit_blocks

    assert (read(300, 299.0), read(300, 300.0), read(3600, 300.0)) == (2, 0, 2)


def test_a_conversation_is_marked_as_a_whole() -> None:
    requests = [
        TracedRequest(
            float(turn * 50 + chat), tuple(b"%d/%d" % (chat, i) for i in range(turn + 3)), 1
        )
        for turn in range(4)
        for chat in range(50)
    ]
    marked = mark_conversations(requests, 0.3, random.Random(1))
    ttls = [{one.ttl_s for one in marked[chat::50]} for chat in range(50)]
    assert all(len(of_chat) == 1 for of_chat in ttls)
    assert 5 <= sum(of_chat == {3600} for of_chat in ttls) <= 25


def test_clones_of_sessions_share_what_these_shared_and_differ_in_all_else() -> None:
    sessions = [
        [
            TracedRequest(turn * 5.0, (b"common", *(b"%d/%d" % (n, i) for i in range(turn))), 1)
            for turn in range(1, 9)
        ]
        for n in range(3)
    ]
    requests = agent_load(sessions, AgentLoad(4, 20, 0.2, 60.0), random.Random(2))
    again = agent_load(sessions, AgentLoad(4, 20, 0.2, 60.0), random.Random(2))
    assert requests == again
    assert [request.at for request in requests] == sorted(request.at for request in requests)
    owners: dict[bytes, set[str]] = {}
    for request in requests:
        for key in request.keys:
            owners.setdefault(key, set()).add(request.org)
    assert len(owners.pop(b"common")) == 20
    assert all(len(orgs) == 1 for orgs in owners.values())
    assert 1 < live_blocks(requests, 4) < 40


def test_the_command_replays_a_block_trace(tmp_path, capsys) -> None:
    path = tmp_path / "trace.jsonl"
    lines = []
    # By a prompt of two blocks it could not be told whether the first one is all chats'.
    chats = [request for request in trace(9, 400) if len(request.keys) > 3]
    for number, request in enumerate(chats):
        ids = [int.from_bytes(key) for key in request.keys]
        lines.append(
            {
                "timestamp": number * 1000,
                "input_length": len(ids) * 512 - 100,
                "output_length": 50,
                "hash_ids": ids,
            }
        )
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = [str(path), "--capacity", "20,60", "--policy", "learned,lru,belady"]
    assert main(["simulate", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["policy"], one["capacity"]) for one in found] == [
        (policy, capacity) for policy in ("learned", "lru", "belady") for capacity in (20, 60)
    ]
    assert all(0 < one["block_hit_ratio"] < 1 for one in found)
    plot = tmp_path / "hits.svg"
    assert main(["simulate", *arguments, "--mark-long", "0.5", "--plot", str(plot)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of requests with 1h" in printed
    assert "belady" in plot.read_text()


def test_the_command_replays_requests_and_finds_what_they_share(tmp_path, capsys) -> None:
    path = tmp_path / "calls.jsonl"
    system = "You are a careful assistant. " * 40
    bodies = [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"Question {number} " * 30},
            ],
        }
        for number in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, bodies)))
    assert main(["simulate", str(path), "--capacity", "1000", "--policy", "lru", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert 0.2 < found["token_hit_ratio"] < 0.75
    path.write_text("")
    assert main(["simulate", str(path)]) == 2
    with pytest.raises(SystemExit):
        main(["simulate", str(path), "--policy", "magic"])
