"""What `make fleet` makes of a load and of what it measures, without a fleet."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.agent_load import Call
from benchmarks.fleet import kept, load, router, table
from benchmarks.fleet.engine import Engine, FrontEnd, Tiers
from benchmarks.fleet.installed import Program
from benchmarks.fleet.load import Prompt
from benchmarks.fleet.measure import _choices, absent
from benchmarks.fleet.measured import Measured
from benchmarks.fleet.router import ROUTERS, Policy
from benchmarks.fleet.row import ONE_REPLICA, Row, all_rows, quick_rows, table_rows
from benchmarks.fleet.run import Run
from benchmarks.fleet.target import verdicts
from benchmarks.harness import BLOCK

REDIS = Engine(FrontEnd.PYTHON, True, Tiers.REDIS)
PLAIN = Engine(FrontEnd.PYTHON, False, Tiers.DEVICE)
RANDOM = ROUTERS[0]
ABOUT = {"model": "tiny", "turns": 1, "pace": 1}


def prompt(tenant: str, *tokens: int) -> Prompt:
    return Prompt(Call(tenant, "s", {}, 0.0), "s", {}, tokens)


def test_what_any_cache_has_to_compute_are_different_blocks_and_what_is_beyond_them() -> None:
    head, one, other = [1] * BLOCK, [2] * BLOCK, [3] * BLOCK
    sessions = [[prompt("a", *head, *one, 9)], [prompt("b", *head, *other, 9, 9)]]
    assert load.first_time(sessions, apart=False) == 3 * BLOCK + 1 + 2
    assert load.first_time(sessions, apart=True) == 4 * BLOCK + 1 + 2
    # Equal blocks behind another head are other blocks; a last whole block is computed.
    behind = [[prompt("a", *one, *head)], [prompt("a", *head, *head)]]
    assert load.first_time(behind, apart=False) == 2 * BLOCK + 2 * BLOCK


@pytest.fixture
def trace(tmp_path) -> Path:
    lines = [
        {"session_id": "x", "timestamp": 5_000_000, "input": "third"},
        {"session_id": "x", "timestamp": 0, "input": "first"},
        {"session_id": "x", "timestamp": 1_500_000, "input": "second"},
        {"session_id": "y", "timestamp": 0, "input": "other"},
        {"session_id": "y", "timestamp": 90_000_000, "input": "after a long while"},
        {"hash_ids": [1]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return path


def test_a_trace_makes_sixteen_sessions_of_four_tenants(trace) -> None:
    sessions = load.from_traces([trace], turns=2)
    assert len(sessions) == 16
    assert len({calls[0].tenant for calls in sessions}) == 4
    first, second = (
        [call.body["messages"][0]["content"][0]["text"] for call in calls] for calls in sessions[:2]
    )
    assert first == ["Session 0.\nfirst", "Session 0.\nsecond"]
    assert second == ["Session 1.\nother", "Session 1.\nafter a long while"]
    assert [call.pause_s for call in sessions[0]] == [0, 1.5]
    # Whoever is away for longer comes back after so long.
    assert sessions[1][1].pause_s == 20
    # Those that begin again are sessions of their own.
    assert sessions[2][0].body != sessions[0][0].body


def test_a_trace_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n')
    with pytest.raises(ValueError, match="no line with timestamp"):
        load.from_traces([path], 2)


class Words:
    """A tokenizer for which a token is a word."""

    def apply_chat_template(self, messages, **_):
        return [hash(word) for m in messages for p in m["content"] for word in p["text"].split()]


def test_editions_share_nothing_and_too_long_prompts_are_left_out(trace) -> None:
    calls = load.from_traces([trace], 3)
    one, other = (load.prompts(calls, label, 0.5, 100, Words()) for label in ("001", "002"))
    assert [len(session) for session in one[:2]] == [3, 2]
    assert one[0][1].call.pause_s == 0.75
    assert all(a.tokens[1] != b.tokens[1] for a, b in zip(one[0], other[0], strict=True))
    # SMG takes no name with spaces for a session's.
    assert one[0][0].session == "001-tenant-0-session-0" != other[0][0].session
    # The text has seven words at most, and 64 tokens are kept free.
    assert [len(session) for session in load.prompts(calls, "1", 1, 64 + 5, Words())][:2] == [3, 1]


def run(read: int, own: int | None = None, across: int | None = None) -> Run:
    return Run(
        prompts=1000,
        read=read,
        ttft_s=(0.1, 0.2, 0.3),
        seconds=1.0,
        first_time=100,
        reads={"s": [read]},
        chosen={"s": [0, None]},
        asked_of_redis={"lookup hit": 1},
        split=(1, 2),
        redis_bytes=None,
        own=own,
        across=across,
        load_average=1.0,
    )


def measured(
    row: Row, *reads: int, own: int | None = None, across: int | None = None, seconds: float = 0.2
) -> Measured:
    runs = [run(read, own, across) for read in reads]
    return Measured(row, tuple(replace(one, ttft_s=(seconds,)) for one in runs))


def test_targets_name_the_row_that_misses_them() -> None:
    plain = measured(Row(RANDOM, PLAIN), 500)
    one = measured(Row(ONE_REPLICA, REDIS), 900, own=10, across=0)
    good, bad = (measured(Row(RANDOM, REDIS), n, own=10, across=0) for n in (890, 499))
    assert [verdict.holds for verdict in verdicts([plain, one, good])] == [True, True, True]
    fewer, as_one, _ = verdicts([plain, one, bad])
    assert not fewer.holds and "random / CacheScope, + Redis" in fewer.found
    assert not as_one.holds


def test_who_chooses_anew_is_compared_by_the_same_choices_where_they_decide() -> None:
    prefix = next(r for r in ROUTERS if (r.name, r.policy) == ("SMG", Policy.PREFIX))
    device = Engine(FrontEnd.PYTHON, True, Tiers.DEVICE)
    plain, anew = measured(Row(prefix, PLAIN), 500), measured(Row(prefix, device), 400)
    alike = measured(Row(prefix, device, replays=True), 501)
    assert [verdict.holds for verdict in verdicts([plain, anew])] == [False]
    assert [verdict.holds for verdict in verdicts([plain, anew, alike])] == [True]
    fewer = measured(Row(prefix, device, replays=True), 499)
    (verdict,) = verdicts([plain, anew, fewer])
    assert not verdict.holds and "by prefix, as for plain" in verdict.found
    # Behind the device a tier has to make up for any choice.
    assert not verdicts([plain, alike, measured(Row(prefix, REDIS), 499)])[0].holds


def test_plain_vllm_is_what_it_reads_by_the_same_choices_and_differs_from_itself() -> None:
    prefix = next(r for r in ROUTERS if (r.name, r.policy) == ("SMG", Policy.PREFIX))
    device = Engine(FrontEnd.PYTHON, True, Tiers.DEVICE)
    # Its first run is what the others replay; the second chose anew.
    anew = measured(Row(prefix, PLAIN), 500, 700)
    alike = measured(Row(prefix, PLAIN, replays=True), 480, 530)
    for read, holds in ((480, True), (479, False)):
        ours = measured(Row(prefix, device, replays=True), read)
        (verdict,) = verdicts([anew, alike, ours])
        assert verdict.holds is holds and "0.960 to 1.060 of their median" in verdict.found
    # What is met by less is named before what is met by more, and what is missed before that.
    better = measured(Row(RANDOM, REDIS), 900), measured(Row(RANDOM, PLAIN), 899)
    (verdict,) = verdicts([anew, alike, ours, *better])
    assert not verdict.holds and "as for plain" in verdict.found


def test_several_runs_are_their_median_with_the_smallest_and_the_largest() -> None:
    row = Row(RANDOM, REDIS)
    cells = table.line(row, measured(row, 300, 500, 400, own=1, across=2))
    assert cells[4:7] == ["3", "400", "40.0% (30.0 to 50.0)"] and cells[-2:] == ["500", "6"]
    page = table.markdown(
        [(row, measured(row, 600)), (Row(RANDOM, PLAIN), measured(Row(RANDOM, PLAIN), 500))],
        ABOUT,
    )
    assert "| the client | Python | random | + Redis | 50.0% | 60.0% | 1.200 |" in page


def test_the_short_form_has_a_line_for_each_router() -> None:
    smg = next(r for r in ROUTERS if (r.name, r.policy) == ("SMG", Policy.PREFIX))
    device = Engine(FrontEnd.PYTHON, True, Tiers.DEVICE)
    rows = [Row(smg, PLAIN), Row(smg, device), Row(smg, device, True), Row(ONE_REPLICA, REDIS)]
    found = [(row, measured(row, 500 + n)) for n, row in enumerate(rows)]
    lines = table.short(found).splitlines()
    assert lines[2:] == [
        "| SMG, Python | by prefix | 50.0% | 50.2% | – | – |",
        "| one big replica | – | – | – | – | 50.3% |",
    ]


def test_a_page_is_quoted_between_its_marks(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured -->\nold\n<!-- /measured -->\nb\n")
    table.quote(page, "new\n")
    assert page.read_text() == "a\n<!-- measured -->\nnew\n<!-- /measured -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(ValueError, match="no lines"):
        table.quote(page, "new\n")


def test_runs_are_kept_by_load_and_state_of_the_code(tmp_path) -> None:
    about, other = {"state": kept.state(), "turns": 6}, {"state": "other", "turns": 6}
    assert list(kept.kept(tmp_path, about)) == []
    kept.add(tmp_path, about, "a row", run(5))
    kept.add(tmp_path, other, "a row", run(6))
    assert list(kept.kept(tmp_path, about)) == [("a row", run(5))]


def test_the_tables_rows_are_some_of_all() -> None:
    names = [row.name for row in all_rows()]
    for some in (table_rows(), quick_rows()):
        assert 0 < len(some) < len(names) and {row.name for row in some} <= {*names}
    kinds = {(row.engine.front_end, row.engine.name) for row in table_rows()}
    assert len(kinds) == len(FrontEnd) * 4


def test_a_call_that_was_recorded_goes_where_it_went() -> None:
    running = [SimpleNamespace(url=f"http://127.0.0.1:{port}") for port in (1, 2)]
    ask = SimpleNamespace(
        routed={("s", 0): "http://127.0.0.1:2", ("s", 1): "grpc://127.0.0.1:1", ("t", 0): "gone"}
    )
    calls = {"s": [5, 5, 5], "t": [5]}
    chosen = _choices(ask, running, calls)  # type: ignore[arg-type]
    assert chosen == {"s": [1, 0, None], "t": [None]}
    ask.routed = {}
    assert _choices(ask, running, calls) == {}  # type: ignore[arg-type]
    urls = [one.url for one in running]
    replayed = router.routed(RANDOM, running, None, {}, 0, chosen)  # type: ignore[arg-type]
    with replayed as choose:
        there = [choose(Call("a", "s", {}, 0.0), number) for number in range(4)]
        # What was not recorded goes anywhere.
        assert there == [urls[1], urls[0], urls[0], urls[1]]


@pytest.mark.parametrize(("own", "across"), [(10, 1), (0, 0)])
def test_isolation_fails_where_something_is_read_or_nothing_shown(own: int, across: int) -> None:
    (verdict,) = verdicts([measured(Row(RANDOM, REDIS), 890, own=own, across=across)])
    assert not verdict.holds


def test_random_routing_that_is_slow_misses_its_target() -> None:
    prefix = next(r for r in ROUTERS if (r.name, r.policy) == ("SMG", Policy.PREFIX))
    fast = measured(Row(prefix, REDIS), 890)
    slow = measured(Row(RANDOM, REDIS), 890, seconds=0.27)
    assert [verdict.holds for verdict in verdicts([fast, slow])] == [False]


def test_what_is_not_installed_stands_in_the_table() -> None:
    missing = Program("SMG", Path("/nowhere"))
    row = Row(replace(ROUTERS[4], program=missing), REDIS)
    assert row.missing == ["SMG"]
    assert "| not installed: SMG |" in table.markdown([(row, absent(row))], ABOUT)


def test_every_front_end_has_each_way_to_choose_with_each_tier() -> None:
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    for front_end in FrontEnd:
        policies = {r.router.policy for r in rows if r.engine.front_end is front_end}
        assert policies == set(Policy)
    kinds = {(row.engine.plugin, row.engine.tiers) for row in rows}
    assert kinds == {(False, Tiers.DEVICE), *((True, tiers) for tiers in Tiers)}


def test_a_client_chooses_alike_whatever_stands_behind_it() -> None:
    call = Call("tenant", "session", {}, 0.0)
    by_session = {router.drawn(Policy.SESSION, call, number, 0) for number in range(9)}
    assert len(by_session) == 1
    at_random = [router.drawn(Policy.RANDOM, call, number, 0) % 2 for number in range(40)]
    assert 10 < sum(at_random) < 30
