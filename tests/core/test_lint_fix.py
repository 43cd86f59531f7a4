"""`lint --fix`: a corrected copy reads more of the cache, and means what it meant."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.broken_sessions import broken_sessions
from tests.core.test_explain_rules import groups, written
from vllm_cachescope.cli import main

SESSIONS = {session.name: session for session in broken_sessions(seed=3)}


def fixed(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main(["lint", str(path), "--fix", "--json", *options]) == 0
    copies: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["copies"]
    return copies[0]


def bodies(path: Path) -> list[Any]:
    return [json.loads(line)["body"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "rule", "place"),
    [
        ("tools_reordered", "tool_order", "tools"),
        ("tool_keys_reordered", "unsorted_json", "tools.Edit"),
        ("tool_list_reordered", "unsorted_json", "tools.Edit"),
        ("call_keys_reordered", "call_keys_reordered", "messages"),
        ("system_value", "changing_system", "system[0]"),
        ("not_covered", "stuck_breakpoint", "messages"),
    ],
)
def test_what_is_mended(
    name: str, rule: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(SESSIONS[name], tmp_path)
    before = path.read_bytes()
    done = fixed(path, capsys)
    (change,) = done["changes"]
    assert (change["rule"], change["place"]) == (rule, place)
    assert change["saves"] == done["reusable_after"] - done["reusable_before"] > 300
    assert path.read_bytes() == before
    copy = tmp_path / f"{name}.fixed.jsonl"
    assert done["output"] == str(copy) and groups(copy) == []
    # Nothing else is another than it was, whichever way it is spelled.
    for old, new in zip(bodies(path), bodies(copy), strict=True):
        assert [m["role"] for m in old["messages"]] == [m["role"] for m in new["messages"]]
        names = [{tool["name"] for tool in body["tools"]} for body in (old, new)]
        assert names[0] == names[1]
        texts = [sorted("".join(json.dumps(b, sort_keys=True).split())) for b in (old, new)]
        assert name in ("system_value", "not_covered") or texts[0] == texts[1]


def test_a_moved_value_is_said_behind_the_last_breakpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(SESSIONS["system_value"], tmp_path)
    fixed(path, capsys)
    for i, body in enumerate(bodies(tmp_path / "system_value.fixed.jsonl")):
        assert "It is" not in body["system"][0]["text"]
        *_, marked, moved = body["messages"][-1]["content"]
        assert "cache_control" in marked
        assert moved == {"type": "text", "text": f"It is 10:{15 + i}:07."}


@pytest.mark.parametrize("name", ["system_changed", "message_cut", "tools_added", "clean"])
def test_what_would_change_the_meaning_is_left(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(SESSIONS[name], tmp_path)
    assert fixed(path, capsys)["changes"] == []
    assert bodies(path) == bodies(tmp_path / f"{name}.fixed.jsonl")


def test_a_value_that_says_nothing_by_itself_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for i in range(4):
        system = f'{{\n"request":\n"{i}f3a"\n}} ' + "Rules of the house. " * 40
        body = {"model": "m", "system": system, "messages": [{"role": "user", "content": "Hi"}]}
        lines.append(json.dumps({"session_id": "s", "body": body}) + "\n")
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(lines))
    done = fixed(path, capsys)
    assert done["changes"] == [] and done["left"][0]["place"] == "system"


def test_a_refused_request_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    blocks = [{"type": "text", "text": f"Rule {i}. " * 40, **mark} for i in range(6)]
    body = {"model": "m", "system": blocks, "messages": [{"role": "user", "content": "Hi"}]}
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"body": body}) + "\n")
    assert main.main(["lint", str(path)]) == 2
    (change,) = fixed(path, capsys)["changes"]
    assert change["rule"] == "refused_request"
    (copy,) = bodies(tmp_path / "calls.fixed.jsonl")
    assert ["cache_control" in block for block in copy["system"]] == [False] * 2 + [True] * 4


def test_where_the_copy_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(SESSIONS["tools_reordered"], tmp_path)
    kept = shutil.copy(path, tmp_path / "kept")
    assert main.main(["lint", str(path), "--fix", "--output", str(path)]) == 2
    assert "--in-place allows that" in capsys.readouterr().err
    assert path.read_bytes() == Path(kept).read_bytes()
    fixed(path, capsys, "--output", str(tmp_path / "out.jsonl"))
    fixed(path, capsys, "--in-place")
    assert bodies(path) == bodies(tmp_path / "out.jsonl") != bodies(Path(kept))
    assert main.main(["lint", str(path), "--fix", "--output", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_session_files_hold_nothing_to_correct(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rollout.jsonl"
    path.write_text(json.dumps({"type": "session_meta", "payload": {"id": "s"}}) + "\n")
    assert main.main(["lint", str(path), "--fix"]) == 2
    assert "holds no request bodies as they were sent" in capsys.readouterr().err
