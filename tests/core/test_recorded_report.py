import io
import json
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.core.agent_session import Agent, Body, tool, words
from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.report import progress
from vllm_cachescope.cli.report.ordered_calls import ordered_calls
from vllm_cachescope.cli.report.repeats import MIN_CHARS, chunks
from vllm_cachescope.cli.report.summary import ratio
from vllm_cachescope.cli.report.tables import in_words
from vllm_cachescope.cli.token_counter import load_counter


@pytest.fixture
def one_a_word(tmp_path: Path) -> Path:
    """A folder with a tokenizer for which each word is a token, so that counts are exact."""
    tokenizer = Tokenizer(models.WordLevel({"w": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """Return the report as JSON, once its sums were checked."""
    assert main(["report", "--json", *args]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert len(rows) == found["calls"]
    for key, of_row in (("tokens", "tokens"), ("shared_tokens", "shared")):
        assert found[key] == sum(row[of_row] for row in rows)
        assert found[key] == sum(session[key] for session in _with_phases(found["sessions"]))
        of_lineages = [one[key] for session in found["sessions"] for one in session["lineages"]]
        assert found[key] == sum(of_lineages)
    for cost in found["costs"].values():
        kinds = "read", "written_5m", "written_1h", "uncached"
        assert sum(cost[kind] for kind in kinds) == found["tokens"]
    for row in rows:
        created = sum(row["created"].values())
        assert row["read"] + created + row["uncached"] == row["tokens"] >= row["shared"]
    assert found["breaks"]["missed_tokens"] == sum(row["missed"] for row in rows)
    best = found["costs"]["best"]["equivalents"]
    assert all(best <= cost["equivalents"] + 0.5 for cost in found["costs"].values())
    return found


def _with_phases(sessions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for session in sessions:
        shared = sum(phase["shared_tokens"] for phase in session["phases"])
        assert session["tokens"] == sum(phase["tokens"] for phase in session["phases"])
        yield {**session, "shared_tokens": shared}


def call(at: float, session: str, model: str, *texts: str, system: str = "") -> Body:
    body: Body = {"model": model, "messages": [{"role": "user", "content": one} for one in texts]}
    if system:
        body["system"] = [{"type": "text", "text": system}]
    return {"timestamp": at, "session_id": session, "body": body}


def test_two_million_tokens_of_which_92_percent_are_reused(
    tmp_path: Path, one_a_word: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two prompts of 80,000 tokens, sent 13 and 12 times: each is written once.
    prompt = "w " * 80_000
    calls = [call(1.7e9 + i, f"s{i % 2}", f"m{i % 2}", prompt) for i in range(25)]
    args = write(tmp_path / "t.jsonl", calls), "--tokenizer", str(one_a_word), "--price", "3"
    costs = report(capsys, *args)["costs"]
    assert costs["5m"]["read"] == 1_840_000 and costs["5m"]["written_5m"] == 160_000
    assert costs["without"]["cost"] == 6.0
    assert costs["5m"]["cost"] == pytest.approx(1.152)
    assert costs["1h"]["cost"] == pytest.approx(1.512)
    assert f"{costs['5m']['saved']:.0%}" == "81%"
    assert main(["report", *args]) == 0
    shown = capsys.readouterr().out
    assert "6.000" in shown and "1.152" in shown and "80.8%" in shown


def test_200_000_tokens_over_50_turns(
    tmp_path: Path, one_a_word: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [call(1.7e9 + i, "s", "m", "w " * 200_000) for i in range(50)]
    args = write(tmp_path / "t.jsonl", calls), "--tokenizer", str(one_a_word), "--price", "3"
    costs = report(capsys, *args)["costs"]
    assert costs["without"]["cost"] == 30.0
    # The first turn writes, for a quarter more than it costs without: 0.75; 49 turns read: 2.94.
    assert costs["5m"]["cost"] == pytest.approx(3.69) == pytest.approx(0.75 + 49 * 0.06)
    # The published 3.60 is the first turn at the plain price, and 50 reads instead of 49.
    assert pytest.approx(3.60) == 0.60 + 50 * 0.06


def test_tokens_read_for_each_fresh_one() -> None:
    cost = {"read": 12_198_713_224, "written_5m": 9_965_286, "written_1h": 0, "uncached": 0}
    assert in_words(cost) == "12,198,713,224 tokens and leaves 9,965,286 fresh, 1,224 to 1"
    assert ratio(5, 0) is None and in_words(cost | {"read": 0, "written_5m": 0}) == "nothing"


PHASES = [(5, 47_177, 104), (30, 546_104, 502_744), (22, 528_286, 492_513), (35, 827_411, 809_445)]


def session_of_92_calls() -> list[Body]:
    """A main agent, agents that explore, one that plans, and the main agent again."""
    calls: list[Body] = []
    system, history = "w " * 104, "h " * 23_023

    def add(model: str, *texts: str, fresh: int = 0, system: str = "") -> None:
        own = f"f{len(calls)} " * fresh
        texts = (*texts, own) if own else texts
        calls.append(call(1.7e9 + 20 * len(calls), "s", model, *texts, system=system))

    add("main", history, system=system)
    add("main", fresh=5_946, system=system)
    for _ in range(3):
        add("title", fresh=6_000)
    for (n, tokens, shared), model in zip(PHASES[1:], ("explore", "plan", "main"), strict=True):
        seen = model == "main"
        prefix = shared // (n if seen else n - 1)
        head = (history,) if seen else (f"{model} " * prefix,)
        fresh = tokens - shared - (0 if seen else prefix)
        for i in range(n):
            each = 0 if i == 0 and not seen else fresh // (n if seen else n - 1)
            last = fresh - each * (n - 1 if seen else n - 2) if i == n - 1 else each
            add(model, *head, fresh=last, system=system if seen else "")
    return calls


def test_the_phases_of_a_session(
    tmp_path: Path, one_a_word: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.jsonl", session_of_92_calls())
    args = path, "--tokenizer", str(one_a_word)
    found = report(capsys, *args)
    assert found["calls"] == 92
    phases = found["sessions"][0]["phases"]
    assert [(one["last_call"] - one["first_call"] + 1, one["tokens"]) for one in phases] == [
        (calls, tokens) for calls, tokens, _ in PHASES
    ]
    assert main(["report", *args]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.split("lineages")[0].splitlines() if "%" in line]
    told = [("0.22%", "47,177"), ("92.06%", "546,104"), ("93.23%", "528,286")]
    for row, (share, tokens) in zip(rows[-4:], [*told, ("97.83%", "827,411")], strict=True):
        assert share in row and tokens in row


def test_breaks_are_told_once_for_each_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, lines = Agent("report", scale=0.5), []
    for turn in range(8):
        if turn % 2:
            agent.tools[4]["description"] += f" Revision {turn}."
        at = 1.7e9 + 60 * turn + (1800 if turn > 5 else 0)
        lines.append({"timestamp": at, "session_id": "s", "body": agent.turn().body()})
    found = report(capsys, write(tmp_path / "t.jsonl", lines))
    changed, expired = found["breaks"]["groups"]
    assert (changed["rule"], changed["calls"]) == ("tool_changed", 4)
    assert changed["place"] == f"tools.{agent.tools[4]['name']}"
    assert (expired["rule"], expired["calls"]) == ("expired", 1)
    assert "1h" in expired["suggestion"]
    row = next(row for row in found["rows"] if row["cause"] == "tools_changed")
    assert row["region"] == "tools" and row["path"] == "tools[4]" and row["missed"] > 1000
    assert row["changes"][0]["fields"] == ["description"]
    assert main(["report", str(tmp_path / "t.jsonl"), "--calls"]) == 0
    told = capsys.readouterr().out.splitlines()[-8:]
    assert sum("tools_changed at tools[4]" in line for line in told) == 4
    assert all(f"t.jsonl:{i}" in line and "%" in line for i, line in enumerate(told, 1))
    # An hour would have kept what expired.
    assert found["costs"]["1h"]["read"] > found["costs"]["5m"]["read"]


def test_repeated_content_by_tool_file_and_scope(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(5)
    tools = [tool(rng, name) for name in ("Bash", "Grep", "Read", "Task")]
    source = "\n".join(words(rng, 60) for _ in range(60))

    def read(number: int, before: str = "") -> list[Body]:
        asked = {"type": "tool_use", "id": f"t{number}", "name": "Read"}
        return [
            {"role": "assistant", "content": [{**asked, "input": {"file_path": "src/main.py"}}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": f"t{number}", "content": before + source}
                ],
            },
        ]

    ask = [{"role": "user", "content": words(rng, 400)}]
    main_call = {"model": "m", "tools": tools, "system": "Main.", "messages": ask}
    twice = {**main_call, "messages": [*ask, *read(1), *read(2, "Read again:\n")]}
    sub = {"model": "m", "tools": tools[1:], "system": "Sub.", "messages": read(3)}
    lines = [
        {"timestamp": 1.7e9 + i, "session_id": session, "body": body}
        for i, (session, body) in enumerate(
            [("s", main_call), ("s", twice), ("s", sub), ("other", {**sub, "system": "Other."})]
        )
    ]
    found = report(capsys, write(tmp_path / "t.jsonl", lines))["elsewhere"]
    assert sum(found["by_scope"].values()) == sum(found["by_tool"].values()) == found["tokens"]
    assert set(found["by_scope"]) == {"prompt", "session", "org"}
    for name in ("Grep", "Read", "Task"):
        assert found["by_tool"][f"definition of {name}"] > 100
    assert "definition of Bash" not in found["by_tool"]
    assert found["by_file"] == {"src/main.py": found["by_tool"]["result of Read"]}
    # Twice in one prompt, in the subagent's, and in that of another session.
    whole = load_counter()(source, b"")
    assert 2.5 * whole < found["by_file"]["src/main.py"] < 3.1 * whole


def test_a_line_in_front_moves_no_chunk() -> None:
    rng = random.Random(1)
    text = "\n".join(words(rng, 50) for _ in range(200))
    before, after = set(chunks(text)), set(chunks("A line more.\n" + text))
    assert len(before & after) >= len(before) - 1 > 10
    assert "".join(chunks(text)) == text
    long = "x" * 10_000
    assert "".join(chunks(long)) == long
    assert all(MIN_CHARS <= len(chunk) <= 1024 for chunk in chunks(long)[:-1])


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = call(1.7e9, "s", "m", "Hello")
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(good) + "\n{cut\n" + json.dumps({"body": {"model": 1}}) + "\n")
    assert main(["report", str(path), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["calls"] == 1
    assert f"{path}:2" in said.err and f"{path}:3" in said.err
    assert main(["report", str(path), "--strict"]) == 2
    capsys.readouterr()
    empty = write(tmp_path / "empty.jsonl", [])
    for args, message in (
        ([empty], "holds no request"),
        ([str(tmp_path / "none.jsonl")], "No such file"),
        ([str(path), "--tokenizer", "./nowhere"], "there is no such file"),
        ([str(path), "--tokenizer", str(path)], "not a tokenizer"),
        ([str(path), "--prices", empty], "prices"),
    ):
        assert main(["report", *args]) == 2, args
        assert message in capsys.readouterr().err
    assert main(["report", empty, "--allow-empty"]) == 0


def test_text_and_block_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    text, lines = "user: " + words(rng, 8000), []
    for turn in range(4):
        lines.append({"timestamp": 1.7e15 + turn * 1e7, "input": text, "session_id": "s"})
        text += f"\n\nassistant: {words(rng, 900)}\n\nuser: {words(rng, 900)}"
    found = report(capsys, write(tmp_path / "text.jsonl", lines))
    assert found["costs"]["5m"]["read"] > 0.6 * found["tokens"]
    blocks = [
        {"timestamp": 1000 * i, "input_length": 512 * n, "hash_ids": list(range(n))}
        for i, n in enumerate((8, 8, 12))
    ]
    found = report(capsys, write(tmp_path / "blocks.jsonl", blocks))
    assert found["costs"]["5m"]["read"] == found["shared_tokens"] == 2 * 8 * 512


def test_files_are_read_side_by_side_in_the_order_of_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "w " * 5000
    calls = [call(1.7e9 + 200 * i, "s", "m", prompt) for i in range(6)]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    # A recorder writes what ends first.
    found = report(
        capsys,
        write(one, [calls[2], calls[0], calls[4]]),
        write(other, [calls[1], calls[5], calls[3]]),
    )
    assert [row["at"] for row in found["rows"]] == [1.7e9 + 200 * i for i in range(6)]
    assert found["costs"]["5m"]["read"] == 5 / 6 * found["tokens"]


def test_calls_without_times_are_a_gap_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = call(0, "s", "m", "w " * 5000)["body"]
    path = write(tmp_path / "t.jsonl", [body] * 3)
    for gap, read in (("10s", 2 / 3), ("6m", 0)):
        found = report(capsys, path, "--gap", gap)
        assert found["untimed_calls"] == 3
        assert found["costs"]["5m"]["read"] == read * found["tokens"]
    assert main(["report", path]) == 0
    assert "3 calls tell no time" in capsys.readouterr().out


def test_a_claude_trace_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent, lines = Agent("traced", scale=0.4), []
    for turn in range(3):
        usage = {"input_tokens": 10, "cache_read_input_tokens": 900 * turn}
        usage["cache_creation_input_tokens"] = 900
        request = {
            "timestamp": 1.7e9 + 20 * turn,
            "method": "POST",
            "url": "https://gateway/v1/messages?beta=true",
            "headers": {"X-Claude-Code-Session-Id": "s1"},
            "body": agent.turn().body(),
        }
        response = {"status_code": 200, "body": {"id": f"msg_{turn}", "usage": usage}}
        lines.append({"request": request, "response": response, "logged_at": "later"})
    found = report(capsys, write(tmp_path / "log.jsonl", lines))
    assert found["measured"] == {"tokens": 3 * 910 + 2700, "read": 2700}
    assert [row["session"] for row in found["rows"]] == ["s1"] * 3
    assert [row["kind"] for row in found["rows"]] == ["first_request", *["continuation"] * 2]


def test_names_in_chat_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(9)
    source = "\n".join(words(rng, 60) for _ in range(40))
    messages: list[Body] = [{"role": "user", "content": "Read it."}]
    for number in range(2):
        function = {"name": "open_file", "arguments": json.dumps({"path": "a/b.txt"})}
        asked = {"id": f"c{number}", "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [asked]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": source},
        ]
    body = {"model": "m", "messages": messages, "seed": 1, "n": 1}
    found = report(capsys, write(tmp_path / "t.jsonl", [body]))["elsewhere"]
    assert set(found["by_tool"]) == {"result of open_file"} and set(found["by_scope"]) == {"prompt"}
    assert found["by_file"]["a/b.txt"] == found["tokens"] > 100


def test_a_terminal_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    path = Path(
        write(tmp_path / "t.jsonl", [call(1.7e9 + i, "s", "m", "Hello") for i in range(70)])
    )
    calls = list(ordered_calls([path], []))
    assert list(progress.with_progress(iter(calls), [path])) == calls
    assert "Reading" in shown.getvalue() and "64 calls" in shown.getvalue()


def test_many_files_without_times(tmp_path: Path) -> None:
    body = call(0, "s", "m", "Hello")["body"]
    paths = [Path(write(tmp_path / f"{i}.jsonl", [body, body])) for i in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
    try:
        found = [path for path, _ in ordered_calls(paths, [])]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [path for path in paths for _ in range(2)]


def test_names_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[2J[red]\x07\u202eevil"
    agent = Agent("hostile", scale=0.4)
    agent.model, agent.tools[2]["name"] = name, name
    lines = []
    for turn in range(4):
        agent.tools[2]["description"] += "!" * (turn == 2)
        lines.append({"timestamp": 1.7e9 + turn, "session_id": name, "body": agent.turn().body()})
    assert main(["report", write(tmp_path / "t.jsonl", lines), "--calls"]) == 0
    said = capsys.readouterr()
    shown = said.out + said.err
    assert "evil" in shown and "[red]" in shown
    assert all(one.isprintable() or one == "\n" for one in shown)
