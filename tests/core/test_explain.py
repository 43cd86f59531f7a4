import argparse
import gzip
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.core.agent_session import Agent, Body, words
from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.cli import explain as command
from vllm_cachescope.cli import main
from vllm_cachescope.cli.block_trace import explain_blocks
from vllm_cachescope.cli.explain import explain_calls
from vllm_cachescope.cli.explanation import Explanation
from vllm_cachescope.cli.traffic import (
    BLOCK_TOKENS,
    BlockCall,
    Call,
    TrafficError,
    protocol_of,
    read_traffic,
    text_request,
)
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, DiagnosisKind
from vllm_cachescope.prompt.request import Protocol, Region
from vllm_cachescope.tenancy.scope import Scope


def write(path: Path, lines: list[Any]) -> Path:
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def explained(path: Path, ttl_s: float | None = None) -> Explanation:
    return Explanation(list(explain_calls(read_traffic(path), ttl_s)))


def run(*args: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    parsed = parser.parse_args(["explain", *args])
    return parsed.run(parsed)


def session(breaks: int, turns: int = 6) -> list[Body]:
    """Bodies of a conversation whose tool changes ``breaks`` times."""
    agent = Agent("recorded", scale=0.3)
    bodies = []
    for turn in range(turns):
        if 0 < turn <= breaks:
            agent.tools[4]["description"] += f" Revision {turn}."
        bodies.append(agent.turn().body())
    return bodies


def check_complete(explanation: Explanation) -> None:
    """Every uncached token of every call has a cause, and none is unknown."""
    for call in explanation.calls:
        diagnosis = call.diagnosis
        uncached = sum(tokens for _, tokens in diagnosis.uncached)
        lost = sum(
            miss.tokens
            for miss in diagnosis.engine
            if miss.cause in (MissCause.EXPIRED, MissCause.NEVER_STORED)
        )
        read = diagnosis.shared_tokens - lost + sum(call.shared.values())
        assert uncached == diagnosis.prompt_tokens - read
        assert diagnosis.unknown_tokens == 0
        assert all(tokens > 0 for _, tokens in diagnosis.uncached)
        assert diagnosis.cause


def test_bodies_by_themselves(tmp_path: Path) -> None:
    explanation = explained(write(tmp_path / "bodies.jsonl", session(2)))
    assert [call.diagnosis.kind for call in explanation.calls] == [
        DiagnosisKind.FIRST_REQUEST,
        DiagnosisKind.TOOLS_CHANGED,
        DiagnosisKind.TOOLS_CHANGED,
        *[DiagnosisKind.CONTINUATION] * 3,
    ]
    assert len(explanation.breaks) == len(explanation.unexpected) == 2
    first = explanation.breaks[0]
    assert first.source == f"{tmp_path}/bodies.jsonl:2"
    assert first.diagnosis.changes[0].path == "tools[4]"
    assert first.diagnosis.changes[0].fields == ("description",)
    totals = explanation.totals()
    assert totals["tools_changed"].calls == 2 and totals["continuation"].calls == 3
    assert totals["tools_changed"].tokens > 5000
    check_complete(explanation)


def test_envelopes(tmp_path: Path) -> None:
    one, other = session(0, 3), Agent("another", scale=0.3)
    lines = [
        {"timestamp": 1763700300.5, "session_id": "b", "body": other.body()},
        {"timestamp": "2026-11-21T10:00:00+00:00", "session_id": "a", "request": one[0]},
        {
            "timestamp": "2026-11-21T10:05:00+00:00",
            "headers": {"X-Claude-Code-Session-Id": "a", "Anthropic-Beta": "x,y"},
            "path": "/v1/messages?beta=true",
            "body": one[1],
        },
        {"timestamp": 1795255560000, "session_id": "a", "body": one[2]},
    ]
    calls = read_traffic(write(tmp_path / "calls.jsonl.gz", lines))
    assert [call.session for call in calls if isinstance(call, Call)] == ["b", "a", "a", "a"]
    assert calls[2].extra["anthropic-beta"] == ["x", "y"]
    kinds = [call.diagnosis.kind for call in explained(tmp_path / "calls.jsonl.gz").calls]
    assert kinds[:2] == [DiagnosisKind.FIRST_REQUEST] * 2
    assert kinds[2:] == [DiagnosisKind.PARAMS_CHANGED, DiagnosisKind.PARAMS_CHANGED]


@pytest.mark.parametrize(
    "timestamp",
    ["1" + "0" * 400, "NaN", "Infinity", "-Infinity", "1e999", "-1e300", '"0001-01-01T00:00:00"'],
)
def test_a_time_that_cannot_be_is_none(
    timestamp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(f'{{"timestamp": {timestamp}, "body": {{"prompt": "x"}}}}\n' * 2)
    assert run(str(path), "--json", "--ttl", "5m") == 0
    calls = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["calls"]
    assert [(call["at"], call["kind"]) for call in calls] == [
        (None, DiagnosisKind.FIRST_REQUEST),
        (None, DiagnosisKind.RETRY),
    ]


def test_calls_are_put_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    bodies = session(0)
    lines = [{"timestamp": 100 + i, "session_id": "s", "body": b} for i, b in enumerate(bodies)]
    random.Random(4).shuffle(lines)
    explanation = explained(write(tmp_path / "shuffled.jsonl", lines))
    assert not explanation.breaks
    assert [call.at for call in explanation.calls] == [100.0 + i for i in range(6)]


def test_a_lifetime_explains_what_expired(tmp_path: Path) -> None:
    bodies = session(0, 3)
    lines = [
        {"timestamp": at, "session_id": "s", "body": body}
        for at, body in zip((0, 200, 700), bodies, strict=True)
    ]
    path = write(tmp_path / "idle.jsonl", lines)
    assert [c.diagnosis.cause for c in explained(path, math.inf).calls][1:] == [
        DiagnosisKind.CONTINUATION
    ] * 2
    explanation = explained(path)
    last = explanation.calls[-1].diagnosis
    assert last.cause == MissCause.EXPIRED and not last.expected
    assert last.engine[0].ttl_s == 300 and last.engine[0].age_s == 200
    assert "1h" in last.suggestion
    check_complete(explanation)


def prompt(system: str, question: str, ttl: str | None = None) -> Body:
    """A body with a breakpoint at the end of its system prompt, and one of its message."""

    def block(text: str, **marker: str) -> list[Body]:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", **marker}}]

    return {
        "model": "m",
        "system": block(system, **({"ttl": ttl} if ttl else {})),
        "messages": [{"role": "user", "content": block(question)}],
    }


@pytest.mark.parametrize(
    ("calls", "expired"),
    [
        # Another conversation keeps the system prompt from expiring, and nothing else.
        ([(0, "a", None), (240, "b", None), (480, "a", None)], [("question", 300, 180)]),
        ([(0, "a", None), (240, "a", None), (480, "a", None)], []),
        ([(0, "a", None), (240, "b", None), (600, "a", None)],
         [("system", 300, 60), ("question", 300, 300)]),
        # What asks for an hour has one, also where a later use asks for less.
        ([(0, "a", "1h"), (600, "a", "1h")], [("question", 300, 300)]),
        ([(0, "a", "1h"), (3000, "b", None), (6000, "a", None)], [("question", 300, 5700)]),
        ([(0, "a", "1h"), (3700, "a", None)], [("system", 3600, 100), ("question", 300, 3400)]),
    ],
)  # fmt: skip
def test_any_use_counts_and_so_do_lifetimes_of_its_own(
    calls: list[tuple[int, str, str | None]], expired: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    rng = random.Random(9)
    system, questions = words(rng, 12_000), {name: words(rng, 8000) for name in "ab"}
    lines = [
        {"timestamp": at, "session_id": "s", "body": prompt(system, questions[name], ttl)}
        for at, name, ttl in calls
    ]
    explanation = explained(write(tmp_path / "calls.jsonl", lines))
    tokens = {"system": len(system) / 4, "question": len(questions["a"]) / 4}
    *_, last = explanation.calls
    misses = [miss for miss in last.diagnosis.engine if miss.cause is MissCause.EXPIRED]
    for miss, (what, ttl_s, age_s) in zip(misses, expired, strict=True):
        assert (miss.ttl_s, miss.age_s) == (ttl_s, age_s)
        assert miss.tokens == pytest.approx(tokens[what], abs=3)


def test_a_lifetime_of_the_whole_request(tmp_path: Path) -> None:
    body = {"model": "m", "prompt": "x" * 4000, "prompt_cache_retention": "24h"}
    lines = [{"timestamp": at, "body": body} for at in (0, 86_000, 200_000)]
    _, second, third = explained(write(tmp_path / "calls.jsonl", lines)).calls
    assert second.diagnosis.engine == ()
    assert third.diagnosis.engine[0].ttl_s == 86_400
    assert "a longer lifetime" in third.diagnosis.suggestion


@pytest.mark.parametrize("protocol", [Protocol.CHAT, Protocol.RESPONSES, Protocol.COMPLETIONS])
def test_other_formats(protocol: Protocol, tmp_path: Path) -> None:
    rng = random.Random(8)
    system, question, answer = words(rng, 3000), words(rng, 500), words(rng, 300)

    def body(system: str, *more: str) -> Body:
        roles = ("user", "assistant") * 3
        turns = [{"role": r, "content": t} for r, t in zip(roles, (question, *more), strict=False)]
        if protocol is Protocol.CHAT:
            return {"model": "m", "messages": [{"role": "system", "content": system}, *turns]}
        if protocol is Protocol.RESPONSES:
            return {"model": "m", "instructions": system, "input": turns}
        return {"model": "m", "prompt": system + question + "".join(more)}

    lines = [body(system), body(system, answer, "go on"), body(system, answer, "go on", "ok", "x")]
    assert protocol_of(lines[0]) is protocol
    explanation = explained(write(tmp_path / "calls.jsonl", lines))
    assert not explanation.breaks
    assert explanation.calls[-1].diagnosis.shared_tokens > 800
    lines.append(body(system + "!", answer, "go on", "ok", "x", "yes", "y"))
    broken = explained(write(tmp_path / "calls.jsonl", lines)).calls[-1].diagnosis
    if protocol is Protocol.COMPLETIONS:
        # One text: all that can be said is where it parts from the text before it.
        assert broken.kind is DiagnosisKind.FORK and 640 <= broken.shared_tokens <= 752
    else:
        assert broken.kind is DiagnosisKind.SYSTEM_CHANGED


# Text traces


def transcript(rng: random.Random, turns: int) -> list[str]:
    return [
        f"{('user', 'assistant')[i % 2]}: {words(rng, 400)}\n\n{words(rng, 200)}"
        for i in range(turns)
    ]


def text_lines(texts: list[str]) -> list[Body]:
    return [
        {"timestamp": 1_760_000_000_000_000 + i * 10**6, "input": text, "session_id": "s"}
        for i, text in enumerate(texts)
    ]


def test_text_traces(tmp_path: Path) -> None:
    turns = transcript(random.Random(1), 11)
    texts = ["\n\n".join(turns[:n]) for n in (1, 3, 5, 7)]
    edited = [*turns]
    edited[2] = edited[2].replace(" ", "  ", 1)
    texts.append("\n\n".join(edited[:9]))
    texts += ["", texts[3]]
    explanation = explained(write(tmp_path / "trace.jsonl.gz", text_lines(texts)))
    assert [call.diagnosis.kind for call in explanation.calls] == [
        DiagnosisKind.FIRST_REQUEST,
        *[DiagnosisKind.CONTINUATION] * 3,
        DiagnosisKind.MESSAGES_CHANGED,
        DiagnosisKind.NEW_LINEAGE,
        DiagnosisKind.RETRY,
    ]
    broken = explanation.calls[4]
    at = next(i for i, (a, b) in enumerate(zip(texts[3], texts[4], strict=False)) if a != b)
    assert broken.char == at
    assert broken.diagnosis.where is not None
    turn, _, offset = broken.diagnosis.where.path.partition("@")
    assert turn == "input[2]" and int(offset) <= at < int(offset) + 500
    assert [call.char for call in explanation.calls[1:4]] == [len(text) for text in texts[:3]]
    check_complete(explanation)


def test_an_answer_quoted_by_another_agent_is_no_break(tmp_path: Path) -> None:
    rng = random.Random(2)
    facts, plan = words(rng, 900), words(rng, 700)
    planner = f"user: Make a plan.\n\nassistant: {facts}\n\n{plan}\n\nuser: Now shorten it."
    leader = f"assistant: We follow this plan:\n\n{facts}\n\n{plan}\n\nuser: Who is next?"
    explanation = explained(write(tmp_path / "quote.jsonl", text_lines([planner, leader])))
    assert explanation.calls[1].diagnosis.kind is DiagnosisKind.NEW_LINEAGE


def test_text_requests() -> None:
    text = "system: Be brief.\n\nAlways.\n\nuser: Hi\n\nassistant: Hello\n\nmore: of it"
    parts = text_request(text).parts
    assert [(p.region, p.role, p.path) for p in parts] == [
        (Region.SYSTEM, "system", "input[0]@0"),
        (Region.SYSTEM, "system", "input[0]@19"),
        (Region.MESSAGES, "user", "input[1]@28"),
        (Region.MESSAGES, "assistant", "input[2]@38"),
        (Region.MESSAGES, "assistant", "input[2]@56"),
    ]
    assert "\n\n".join(part.content for part in parts) == text
    for part in parts:
        assert text[int(part.path.partition("@")[2]) :].startswith(part.content)


# Block traces


def block_calls(rows: list[tuple[float, int, tuple[int, ...]]]) -> list[BlockCall]:
    return [BlockCall(f"t:{i}", at, n, blocks) for i, (at, n, blocks) in enumerate(rows, 1)]


ROWS = [
    (0.0, 1300, (1, 2, 3)),
    (10.0, 1700, (1, 2, 4, 5)),  # goes on from a last block of 276 tokens
    (20.0, 1700, (1, 2, 4, 5)),
    (30.0, 1536, (1, 2, 6)),
    (40.0, 2048, (1, 2, 6, 7)),  # its ancestor's last block was full
    (900.0, 100, (8,)),
    (910.0, 2048, (1, 2, 6, 7)),
]


def test_block_traces() -> None:
    explanation = Explanation(list(explain_blocks(block_calls(ROWS))))
    assert [call.diagnosis.kind for call in explanation.calls] == [
        DiagnosisKind.FIRST_REQUEST,
        DiagnosisKind.CONTINUATION,
        DiagnosisKind.RETRY,
        DiagnosisKind.FORK,
        DiagnosisKind.CONTINUATION,
        DiagnosisKind.NEW_LINEAGE,
        DiagnosisKind.RETRY,
    ]
    assert [dict(call.diagnosis.uncached) for call in explanation.calls] == [
        {DiagnosisKind.FIRST_REQUEST: 1300},
        {MissCause.PARTIAL_BLOCK: 276, NEW_CONTENT: 400},
        {},
        {NEW_CONTENT: 512},
        {NEW_CONTENT: 512},
        {DiagnosisKind.NEW_LINEAGE: 100},
        {},
    ]
    check_complete(explanation)


def test_block_traces_with_a_lifetime() -> None:
    last = list(explain_blocks(block_calls(ROWS), 300))[-1].diagnosis
    assert last.cause == MissCause.EXPIRED and dict(last.uncached) == {MissCause.EXPIRED: 2048}


def test_block_traces_agree_with_a_count_of_blocks() -> None:
    """The reusable tokens are those of leading blocks that some earlier call had."""
    rng = random.Random(6)
    rows: list[tuple[float, int, tuple[int, ...]]] = []
    fresh = iter(range(10**6))
    for i in range(400):
        head = rng.choice(rows)[2] if rows and rng.random() < 0.7 else ()
        blocks = (*head[: rng.randrange(len(head) + 1)], *(next(fresh) for _ in range(3)))
        rows.append((float(i), len(blocks) * BLOCK_TOKENS, blocks))
    seen: set[int] = set()
    expected = 0
    for _, _, blocks in rows:
        for block in blocks:
            if block not in seen:
                break
            expected += BLOCK_TOKENS
        seen |= set(blocks)
    explanation = Explanation(list(explain_blocks(block_calls(rows))))
    assert explanation.reusable_tokens == expected
    check_complete(explanation)


# The command


def test_max_breaks_guards_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "bodies.jsonl", session(2)))
    assert run(path) == 0
    assert run(path, "--max-breaks", "2") == 0
    assert run(path, "--max-breaks", "1") == 1
    clean = str(write(tmp_path / "clean.jsonl", session(0)))
    assert run(clean, "--max-breaks", "0") == 0
    assert run(clean, path, "--max-breaks", "1") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max-breaks=-1", "'-1' is not a count"),
        ("--max-breaks=many", "'many' is not a count"),
        ("--ttl=5", "'5' is not a duration: write a positive whole number and s, m, h or d"),
    ],
)
def test_wrong_arguments(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("calls.jsonl", argument)
    assert message in capsys.readouterr().err


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(write(tmp_path / "bodies.jsonl", session(1))))
    printed = capsys.readouterr().out
    for part in (
        "CS204 tool_changed at tools[4].description: 1 call, 3,483 tokens, 12.9% of all\n",
        f"      {tmp_path}/bodies.jsonl:2: Fetch: text was added at its end\n",
        " of tools[4].description:\n      - '…",
        " Revision 1.'\n",
        "6 calls",
        "1 breaks, 1 of them unexpected",
    ):
        assert part in printed
    assert "lineage 1" not in printed


def test_each_break_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(write(tmp_path / "bodies.jsonl", session(1))), "--all")
    printed = capsys.readouterr().out
    for part in (
        "lineage 1",
        f"{tmp_path}/bodies.jsonl:2  CS204 tool_changed at tools[4].description, token 589; 3,483",
        "tool_changed at tools[4]: Fetch (description)",
    ):
        assert part in printed


def test_files_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "calls.jsonl", session(1, 2))
    files = [f"{tmp_path}/{name}/calls.jsonl" for name in "ab"]
    run(*files, "--all")
    lines = capsys.readouterr().out.splitlines()
    for file in files:
        told = lines[lines.index(f"{file}, lineage 1") + 1]
        assert told.startswith(f"  {file}:2  CS204 tool_changed at tools[4].description")


def test_conversations_that_could_have_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(3)
    rules = words(rng, 4000)
    bodies = [
        {
            "model": "m",
            "system": [{"type": "text", "text": f"It is 10:15:3{i}. {rules}"}],
            "messages": [{"role": "user", "content": words(rng, 200)}],
        }
        for i in range(3)
    ]
    path = str(write(tmp_path / "prompts.jsonl", bodies))
    assert run(path, "--max-breaks", "0") == 0
    printed = capsys.readouterr().out
    for part in (
        "No prefix broke.\nCS701 could_share at system[0]: 2 calls, ",
        f"      {path}:2 to {path}:3: a value in a system block that is another one in each",
        "      character 13 of system[0]:\n      - 'It is 10:15:31. ",
        "      → Move the value that varies in system[0] into the latest message.\n",
        "0 breaks, 0 of them unexpected; 2 new lineages could have shared more.",
    ):
        assert part in printed
    run(path, "--json")
    data = json.loads(capsys.readouterr().out)
    assert (data["could_share"], data["breaks"]) == (2, 0)


def of_one_head(scope: str | None, name: str, at: float = 0, model: str = "m") -> dict[str, Any]:
    """An envelope of a session that asks something of its own behind tools and rules of all."""
    agent = Agent("of all", scale=0.3)
    body = {**agent.body(), "model": model}
    mark = {"type": "ephemeral"} | ({"scope": scope} if scope else {})
    head = {"type": "text", "text": "Follow the rules of the house. " * 80, "cache_control": mark}
    question = {"role": "user", "content": f"What does {name} ask? " * 20}
    body |= {"system": [head], "messages": [question]}
    return {"timestamp": at, "session_id": name, "body": body}


@pytest.mark.parametrize("scope", ["global", "org", "session", None])
def test_what_conversations_share_is_counted_by_scope(scope: str | None, tmp_path: Path) -> None:
    calls = [of_one_head(scope, name) for name in ("one", "other", "third")]
    explanation = explained(write(tmp_path / "heads.jsonl", calls))
    per_call = explanation.prompt_tokens // 3
    shared = explanation.shared
    if scope == "session":
        # The tools in front of the mark are the organisation's.
        assert list(shared) == [Scope.ORG]
        assert explanation.reusable_tokens == shared.total() < 2 * 0.9 * per_call
        return
    assert list(shared) == [Scope.parse(scope or "org")]
    assert 2 * 0.8 * per_call < shared.total() == explanation.reusable_tokens < 2 * per_call
    assert explanation.to_dict()["shared_tokens"] == {scope or "org": shared.total()}
    assert [bool(call.shared) for call in explanation.calls] == [False, True, True]
    assert explanation.totals()["first_request"].calls == 3


def test_what_conversations_share_expires_and_is_of_one_model(tmp_path: Path) -> None:
    later = [of_one_head(None, "one"), of_one_head(None, "other", at=301)]
    used = [*later[:1], of_one_head(None, "third", at=200), *later[1:]]
    other = [of_one_head(None, "one"), of_one_head(None, "other", model="another")]
    for name, calls, ttl_s, shared in [
        ("later", later, None, 0),
        ("refreshed", used, None, 2),
        ("kept for longer", later, 600, 1),
        ("without expiry", later, math.inf, 1),
        ("another model", other, None, 0),
    ]:
        explanation = explained(write(tmp_path / f"{name}.jsonl", calls), ttl_s)
        assert sum(bool(call.shared) for call in explanation.calls) == shared, name


def test_files_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        str(write(tmp_path / f"{name}.jsonl", [of_one_head(None, name)])) for name in ("a", "b")
    ]
    assert run(*files) == 0
    assert "tokens of scope org were left by other conversations" in capsys.readouterr().out


def test_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(write(tmp_path / "bodies.jsonl", session(1))), "--json")
    data = json.loads(capsys.readouterr().out)
    assert len(data["calls"]) == 6 and data["unexpected_breaks"] == 1
    broken = data["calls"][1]
    assert broken["kind"] == broken["cause"] == "tools_changed"
    assert broken["where"]["path"] == "tools[4]" and broken["changes"][0]["names"] == ["Fetch"]
    assert sum(t["tokens"] for t in data["totals"].values()) == (
        data["prompt_tokens"] - data["reusable_tokens"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "calls.jsonl:1: not JSON"),
        (b"[1]", "calls.jsonl:1#1: not an object"),
        (b'\n{"a": 1}', "calls.jsonl:2: not a request"),
        (b'{"hash_ids": [1], "timestamp": "x"}', "calls.jsonl:1: timestamp"),
        (b'{"prompt": "x"}\n{"hash_ids": [1], "timestamp": 1, "input_length": 5}', "holds both"),
        (b'{"messages": [], "cache_control": {"type": "x"}}', "cache_control.type"),
        (b"[" * 100_000, "not JSON"),
        *(
            (b'{"hash_ids": [1], "timestamp": %s, "input_length": 5}' % at, "calls.jsonl:1: times")
            for at in (b"NaN", b"Infinity", b"1" + b"0" * 400)
        ),
        *(
            (b'{"hash_ids": [1], "timestamp": 1, "input_length": %d}' % n, "calls.jsonl:1: input_l")
            for n in (-5, 513)
        ),
    ],
)
def test_files_that_cannot_be_read(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrafficError, match=message.replace("[", r"\[")):
        read_traffic(path)
    assert run(str(path)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_or_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nowhere.jsonl")) == 2
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(session(0)[0]).encode())[:-40])
    assert run(str(cut)) == 2
    whole = bytearray(gzip.compress(json.dumps(session(0)[0]).encode()))
    whole[60:200] = bytes(140)
    for content in (b"not gzip", whole):
        cut.write_bytes(content)
        capsys.readouterr()
        assert run(str(cut)) == 2
        assert f"{cut}: " in capsys.readouterr().err


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b'{"prompt": "a\xff\xfe b"}\n{"prompt": "a\xff\xfe b"}\n')
    assert [call.diagnosis.kind for call in explained(path).calls] == [
        DiagnosisKind.FIRST_REQUEST,
        DiagnosisKind.RETRY,
    ]


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    assert len(read_traffic(path)) == 1


def test_more_hash_ids_than_tokens() -> None:
    rows = [(0.0, 100, (1, 2)), (1.0, 700, (1, 3))]
    check_complete(Explanation(list(explain_blocks(block_calls(rows)))))


# The process


@pytest.fixture(params=["explain", "lint"])
def awkward(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command line that prints half a surrogate pair."""
    bodies = session(0, 2)
    for i, body in enumerate(bodies):
        body["tools"][0]["name"] = f"\ud800 {i}"
        body["tools"][1]["\ud800"] = "2026-11-21"
        body["tools"][1]["description"] = {"\ud800" * 10: f"{i} {'x' * i}"}
    lines = [{"session_id": "\ud800", "body": body} for body in bodies]
    path = write(tmp_path / "calls.jsonl", lines)
    return [sys.executable, "-m", "vllm_cachescope.cli.main", request.param, str(path)]


def test_what_cannot_be_encoded_is_escaped(
    awkward: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(awkward[3:]) in (0, 1)
    assert r"\ud800" in capsys.readouterr().out
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(awkward, env=environment, capture_output=True, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    assert r"\ud800" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_pipe_that_nobody_reads(awkward: list[str], options: list[str]) -> None:
    with subprocess.Popen(
        [*awkward, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "empty.jsonl", [])
    full = write(tmp_path / "full.jsonl", [{"model": "m", "messages": []}])
    assert run(str(full), str(path)) == 2
    assert f"{path}: holds no request; --allow-empty" in capsys.readouterr().err
    assert run(str(path), "--allow-empty") == 0
    assert "0 calls" in capsys.readouterr().out


def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}) + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.encode() * 2)))
    assert run("-", "--json") == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    assert [call["source"] for call in calls] == ["-:1", "-:2"]


def test_ignored_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "system", "content": [content]}, {"role": "user", "content": "Hello"}]
    path = write(tmp_path / "traffic.jsonl", [{"model": "m", "messages": messages}] * 2)
    place = "messages[0].content[0].cache_control"
    assert run(str(path)) == 0
    shown = capsys.readouterr().out
    assert f"{path}:1  empty at {place}" in shown
    assert "(2 times)" in shown
    assert run(str(path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ignored_markers"] == 2
    marker = {"path": place, "reason": "empty"}
    assert [call["ignored_markers"] for call in told["calls"]] == [[marker]] * 2
