"""Sessions with one known cause each are put down to it, and to nothing else."""

import gzip
import json
import re
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from benchmarks.broken_sessions import AT, Session, broken_sessions
from tests.core.test_explain import run
from vllm_cachescope.cli import main
from vllm_cachescope.cli.explain import explain_calls
from vllm_cachescope.cli.explanation import Explanation
from vllm_cachescope.cli.findings.edits import EditKind, edit_of
from vllm_cachescope.cli.findings.group import Group, grouped
from vllm_cachescope.cli.findings.rules import RULES
from vllm_cachescope.cli.traffic import read_traffic

SESSIONS = {session.name: session for session in broken_sessions(seed=7)}


def written(session: Session, tmp_path: Path) -> Path:
    path = tmp_path / f"{session.name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in session.records))
    return path


def groups(path: Path, **options: Any) -> list[Group]:
    return grouped(Explanation(list(explain_calls(read_traffic(path), **options))).calls)


@pytest.mark.parametrize("name", SESSIONS)
def test_each_cause_is_named(name: str, tmp_path: Path) -> None:
    session = SESSIONS[name]
    found = groups(written(session, tmp_path))
    if not session.rule:
        assert found == []
        return
    assert found[0].loss.rule.name == session.rule
    # Where a breakpoint went, the turn that it left out is missed once more.
    assert {group.loss.rule.name for group in found} <= {session.rule, "not_covered"}
    assert found[0].tokens > 0
    if session.area in ("tools", "system", "messages"):
        assert found[0].loss.path.startswith(session.area)
    changed = session.rule.endswith(("changed", "value", "spaces", "cut"))
    if changed and session.area in ("tools", "system", "messages"):
        told = found[0].loss.quote
        assert told is not None and told.before != told.after
    if found[0].calls == 1 and session.rule != "expired":
        assert found[0].first.endswith(f":{AT + 1}")


def test_no_text_is_quoted_if_it_must_not_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(SESSIONS["system_changed"], tmp_path))
    run(path, "--all")
    assert "orchard" in capsys.readouterr().out
    for form in ("text", "json", "sarif", "github"):
        run(path, "--all", "--no-text", "--format", form)
        printed = capsys.readouterr().out
        assert "orchard" not in printed and "system_changed" in printed


def test_the_place_is_exact_to_the_character(tmp_path: Path) -> None:
    session = SESSIONS["system_changed"]
    before, after = (r["body"]["system"][0]["text"] for r in session.records[AT - 1 : AT + 1])
    at = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    (found,) = groups(written(session, tmp_path))
    assert found.loss.quote is not None and found.loss.quote.char == at
    (broken,) = Explanation(list(explain_calls(read_traffic(written(session, tmp_path))))).breaks
    tools = sum(
        len(json.dumps(t, separators=(",", ":"))) for t in session.records[0]["body"]["tools"]
    )
    assert broken.diagnosis.where is not None
    assert broken.diagnosis.where.token == pytest.approx((tools + at) / 4, abs=15)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("a b", "a  b", EditKind.SPACES),
        ("a\nb ", "a\r\nb", EditKind.SPACES),
        ("caf\u00e9", "cafe\u0301", EditKind.UNICODE),
        ("It is 10:15.", "It is 11:02.", EditKind.VALUE),
        ("id 7c1d-10 x", "id 9fae-77 x", EditKind.VALUE),
        ("turn 9 of it", "turn 10 of it", EditKind.VALUE),
        ("weigh it", "weigh it twice", EditKind.GREW),
        ("x" * 500, "[cleared]", EditKind.CUT),
        ("weigh it", "count it", EditKind.TEXT),
        ({"b": 1, "a": [2]}, {"a": [2], "b": 1}, EditKind.KEYS),
        ({"required": ["a", "b"]}, {"required": ["b", "a"]}, EditKind.LISTS),
        ({"id": "x1", "input": {}}, {"id": "x2", "input": {}}, EditKind.IDS),
        ({"text": "a b", "n": 1}, {"text": "a  b", "n": 1}, EditKind.SPACES),
    ],
)
def test_kinds_of_edits(old: Any, new: Any, kind: EditKind) -> None:
    assert edit_of(old, new).kind is kind


def test_codes_are_stable() -> None:
    """A code that a job allows or forbids means the same for ever: add, and never change."""
    codes = {rule.code: rule.name for rule in RULES.values()}
    assert len(codes) == len(RULES) and list(codes) == sorted(codes)
    for code, name in [
        ("CS101", "model_changed"), ("CS203", "tools_reordered"), ("CS206", "tool_list_reordered"),
        ("CS305", "system_value"), ("CS407", "call_ids_changed"), ("CS410", "context_compacted"),
        ("CS601", "expired"), ("CS602", "not_covered"), ("CS603", "not_read"),
        ("CS701", "could_share"), ("CS801", "timestamp"), ("CS811", "stuck_breakpoint"),
    ]:  # fmt: skip
        assert codes[code] == name


def test_a_job_allows_and_forbids_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expired, compacted = (
        str(written(SESSIONS[name], tmp_path)) for name in ("expired", "context_compacted")
    )
    strict = ("--max-breaks", "0")
    assert run(expired) == 0
    assert run(expired, *strict) == 1
    assert run(expired, *strict, "--allow", "CS601") == 0
    assert run(expired, *strict, "--allow", "expired,tools_added") == 0
    assert run(expired, *strict, "--allow", "CS602") == 1
    assert run(expired, *strict, "--ttl", "1h") == 0
    assert run(compacted, *strict) == 0
    assert run(compacted, "--forbid", "context_compacted") == 1
    with pytest.raises(SystemExit):
        run(expired, "--allow", "nonsense")
    assert "'nonsense' is no rule" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        run("--rules")
    assert "call_ids_changed" in capsys.readouterr().out


def test_a_summary_stays_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for i in range(300):
        system = f"{'Rules of the house. ' * 60}It is {i}:15."
        body = {"model": "m", "system": system, "messages": [{"role": "user", "content": "Hello"}]}
        lines.append(json.dumps({"session_id": "s", "body": body}) + "\n")
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(lines))
    run(str(path))
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 25 and "299 calls" in short
    run(str(path), "--all")
    assert len(capsys.readouterr().out.splitlines()) > 300


def test_lines_left_out_are_told_and_fail_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(SESSIONS["system_changed"], tmp_path)
    path.write_text(path.read_text()[:-200])
    for command in ("explain", "lint"):
        assert main.main([command, str(path)]) in (0, 1)
        said = capsys.readouterr()
        assert f"left out {path}:6: not JSON" in said.err and said.out
        assert main.main([command, str(path), "--strict"]) == 2
        capsys.readouterr()
    run(str(path), "--json")
    assert len(json.loads(capsys.readouterr().out)["left_out"]) == 1


def test_forms_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(SESSIONS["system_value"], tmp_path))
    for command in ("explain", "lint"):
        main.main([command, path, "--format", "sarif"])
        log = json.loads(capsys.readouterr().out)
        (made,) = log["runs"]
        assert log["version"] == "2.1.0" and made["results"]
        for result in made["results"]:
            rule = made["tool"]["driver"]["rules"][result["ruleIndex"]]
            assert rule["id"] == result["ruleId"] and re.fullmatch(r"CS\d{3}", rule["id"])
            (place,) = result["locations"]
            assert place["physicalLocation"]["artifactLocation"]["uri"] == path
            assert place["physicalLocation"]["region"]["startLine"] >= 1
        main.main([command, path, "--format", "github"])
        first = capsys.readouterr().out.splitlines()[0]
        assert re.match(rf"::warning file={path},line=\d,title=CS\d{{3}} \w+::\S", first)


def test_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(SESSIONS["clean"], tmp_path))
    run(path, "--json")
    whole = json.loads(capsys.readouterr().out)
    run(path, "--json", "--block-size", "528")
    blocks = json.loads(capsys.readouterr().out)
    lost = whole["reusable_tokens"] - blocks["reusable_tokens"]
    assert lost == blocks["totals"]["partial_block"]["tokens"] > 500
    assert [one["rule"] for one in blocks["findings"]] == ["block_straddle"]
    for call in blocks["calls"][1:]:
        assert (call["prompt_tokens"] - sum(call["uncached"].values())) % 528 == 0
    run(path, "--json", "--block-size", "4096")
    short = json.loads(capsys.readouterr().out)
    assert [one["rule"] for one in short["findings"]] == ["short_prefix"]
    assert short["reusable_tokens"] == 0
    assert run(path, "--block-size", "4096", "--forbid", "CS605") == 1


def test_a_heat_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(written(SESSIONS["system_value"], tmp_path)), "--heat-map")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("CS305")]
    assert len(rows) == 5
    assert all("█" in row and "▓" in row and "░" in row for row in rows)
    # The longer the conversation, the more of it is lost.
    assert [row.count("▓") for row in rows] == sorted(row.count("▓") for row in rows)


def envelope(at: float, session: str, *texts: str, ttl: str | None = None) -> dict[str, Any]:
    mark = {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})
    system = [{"type": "text", "text": "Rules of the house. " * 200, "cache_control": mark}]
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"model": "m", "system": system, "messages": messages, "cache_control": mark}
    return {"timestamp": at, "session_id": session, "body": body}


@pytest.mark.parametrize(
    ("records", "expired"),
    [
        # Another session of the organisation keeps the shared head alive, and nothing else.
        ([(0, "a"), (200, "b"), (400, "a")], 100),
        ([(0, "a"), (400, "a")], 1100),
        ([(0, "a", "1h"), (400, "a", "1h")], 0),
        ([(0, "a", "1h"), (3700, "a", "1h")], 1100),
    ],
)
def test_lifetimes_come_from_the_bodies(records: list[Any], expired: int, tmp_path: Path) -> None:
    question = {"a": "Weigh the pears. " * 23, "b": "Count the tubs. " * 23}
    lines = [
        envelope(at, session, question[session], ttl=ttl[0] if ttl else None)
        for at, session, *ttl in records
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [g for g in groups(path) if g.loss.rule.name == "expired"]
    assert sum(g.tokens for g in found) == pytest.approx(expired, abs=5)
    assert groups(path, ttl_s=7200) == []


def test_usage_outweighs_what_was_expected(tmp_path: Path) -> None:
    """A pause is no expiry where the response says that all was read."""
    session = SESSIONS["expired"]
    usage = {"input_tokens": 100, "cache_read_input_tokens": 2400, "cache_creation_input_tokens": 9}
    records = [{**record, "usage": usage} for record in session.records]
    path = written(Session("usage", "cache", records), tmp_path)
    assert groups(path) == []


def test_a_change_in_a_large_prompt_takes_bounded_time(tmp_path: Path) -> None:
    records = []
    for i in range(4):
        system = f"{'1:15 ' * 200_000}{i}" + "é 2026-01-01 " * 50_000
        body = {"model": "m", "system": system, "messages": [{"role": "user", "content": "Hello"}]}
        records.append({"session_id": "s", "body": body})
    path = written(Session("large", "system", records), tmp_path)
    start = time.thread_time()
    (found,) = groups(path)
    assert time.thread_time() - start < 5
    assert found.loss.quote is not None and found.loss.quote.char == 1_000_000
    assert len(found.loss.quote.before) < 200


def test_the_engines_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(SESSIONS["clean"], tmp_path))
    packed = (resources.files("vllm_cachescope.cli") / "tokenizer.json.gz").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    run(path, "--json")
    estimated = json.loads(capsys.readouterr().out)["prompt_tokens"]
    run(path, "--json", "--tokenizer", str(tmp_path))
    counted = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert counted != estimated and 0.3 < counted / estimated < 3
    assert run(path, "--tokenizer", str(tmp_path / "nowhere.json")) == 2
    assert "there is no such file" in capsys.readouterr().err
