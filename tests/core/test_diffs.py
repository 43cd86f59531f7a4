"""Diffs of what broke a prefix: what is written, what is left out, and how little of it is kept."""

import errno
import gc
import io
import json
import re
import stat
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.core.reach import reachable
from vllm_cachescope.api import diffs as module
from vllm_cachescope.api import prompt_texts
from vllm_cachescope.api.break_log import Break
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.prompt_texts import PromptTexts
from vllm_cachescope.api.redaction import REDACTED, Redaction
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.config import ConfigError, DiffSettings
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS

PLANTED = "the walrus said to the carpenter"
ACME = Caller("acme", "s")


class Side:
    """The API's side of breaks, with or without diffs, on a clock that stands still."""

    def __init__(self, directory: Path | None, **settings: Any) -> None:
        self.now = 1000.0
        self.asked = 0
        self.directory = directory
        self.diffs = None
        if directory is not None:
            self.diffs = Diffs(DiffSettings(directory=directory, **settings), lambda: self.now)
        self.diagnoser = Diagnoser(
            b"a secret of tests",
            16,
            lambda: self.now,
            lambda: float(self.asked),
            self.diffs,
            CollectorRegistry(),
        )

    def ask(self, body: dict[str, Any], caller: Caller = ACME) -> None:
        """Put a request through of which the beginning is read; the rest is like no other's."""
        request = READERS[Protocol.MESSAGES](body, (300, 3600))
        pending = self.diagnoser.open(caller, request, body, {})
        self.asked += 1
        rows = Row("read_device", Scope.ORG, 300, 320), Row("created", Scope.ORG, 300, 2880)
        report = Report(rows, engine=EngineId(0, "e"))
        tokens = [*range(320), *[1000 + self.asked] * 2880]
        timing = PromptTiming(tokens, 3200, 3200, self.now, self.now)
        self.diagnoser.close(pending, [report], None, [timing])

    def last(self) -> tuple[Break, str]:
        """Return the latest break, and its diff."""
        seen = self.diagnoser.breaks.recent(None)[0]
        assert self.diffs is not None and self.directory is not None and seen.diff is not None
        self.diffs.flush()
        return seen, (self.directory / seen.diff).read_text()


@pytest.fixture
def side(tmp_path: Path) -> Side:
    return Side(tmp_path / "diffs", redact=[r"project \w+"])


def body(system: str = "", description: str = "Weighs things.") -> dict[str, Any]:
    schema = {"type": "object", "properties": {"weight": {"type": "number", "minimum": 0}}}
    return {
        "model": "m",
        "max_tokens": 5,
        "tools": [{"name": "weigh", "description": description, "input_schema": schema}],
        "system": [{"type": "text", "text": f"You weigh.\n{'Carefully. ' * 200}\n{system}\nBye."}],
        "messages": [{"role": "user", "content": "How heavy is it? " * 200}],
    }


def test_a_changed_system_block(side: Side) -> None:
    side.ask(body("It is Monday."))
    side.ask(body("It is Friday."))
    seen, text = side.last()
    head, _, change, *lines = text.splitlines()
    assert json.loads(head.removeprefix("# ")) == {
        "at": 2.0,
        "org": "acme",
        "session": "s",
        "model": "m",
        "cause": "system_changed",
        "lineage": 1,
    }
    assert change.startswith("# system_changed at system[0]")
    assert lines[:2] == ["--- system[0] before", "+++ system[0] now"]
    assert [line for line in lines if line[0] in "+-"][2:] == ["-It is Monday.", "+It is Friday."]
    assert seen.to_dict(for_operator=True)["diff"] == seen.diff
    assert "diff" not in seen.to_dict()


def test_a_changed_tool_is_shown_field_by_field(side: Side) -> None:
    side.ask(body())
    changed = body()
    changed["tools"][0]["input_schema"]["properties"]["weight"]["minimum"] = 1
    side.ask(changed)
    _, text = side.last()
    assert '-        "minimum": 0' in text and '+        "minimum": 1' in text
    assert len([line for line in text.splitlines() if line.startswith(("+ ", "- "))]) == 2


def test_files_are_the_servers_own(side: Side, tmp_path: Path) -> None:
    side.ask(body("a"))
    side.ask(body("b"))
    seen, _ = side.last()
    assert seen.diff is not None and side.directory is not None
    assert stat.S_IMODE(side.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((side.directory / seen.diff).stat().st_mode) == 0o600
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"diffs\.directory.*755.*700"):
        Diffs(DiffSettings(directory=tmp_path / "open"), lambda: 0.0)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        Diffs(DiffSettings(directory=tmp_path / "file"), lambda: 0.0)


SECRETS = [
    "sk-ant-api03-Zm9vYmFyYmF6cXV4",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "Authorization: Bearer abc.def-ghi",
    "password = hunter2hunter2",
    '"api_key": "0123456789abcdef"',
    "someone.else+lists@mail.example.org",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEowIBAAKCAQEA\n-----END",
    r"-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END PRIVATE KEY-----\n",
    'password = "hunter2 hunter2"',
    r"{\"client_secret\": \"0123456789abcdef\"}",
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG",
    "access_key: 0123456789abcdef",
    "pwd=hunter2hunter2",
    "postgres://admin:hunter2secret@localhost/db",
    "npm_abcdefghijklmnopqrstuvwxyz0123456789",
    "project aurora",
]


@pytest.mark.parametrize("where", ["system", "description"])
@pytest.mark.parametrize("secret", SECRETS)
def test_what_is_secret_is_left_out_of_both_sides(side: Side, secret: str, where: str) -> None:
    side.ask(body(**{where: f"Old and {secret} here."}))
    side.ask(body(**{where: f"New and {secret} here."}))
    _, text = side.last()
    assert re.search("^-.*Old and", text, re.M) and re.search(r"^\+.*New and", text, re.M)
    assert text.count(REDACTED) == 2
    for word in secret.split():
        assert len(word) < 8 or word not in text
    assert not [kept for kept in strings_behind(side.diagnoser) if secret in kept]


def test_what_a_field_with_the_name_of_a_secret_holds_is_left_out(side: Side) -> None:
    for word in ("Old", "New"):
        asked = body()
        field = {"type": "string", "description": f"{word} key.", "enum": [word * 4, 70001, None]}
        asked["tools"][0]["input_schema"]["properties"] |= {
            "apiKey": field,
            "max_tokens": {"default": f"{word} default"},
        }
        side.ask(asked)
    _, text = side.last()
    assert '"description": "New key."' in text and '"default": "New default"' in text
    assert "NewNew" not in text and "OldOld" not in text and "70001" not in text
    assert not [kept for kept in strings_behind(side.diagnoser) if "OldOld" in kept]


def test_a_change_in_a_secret_only_is_said_to_be_one(side: Side) -> None:
    side.ask(body("token: 1111111111"))
    side.ask(body("token: 2222222222"))
    _, text = side.last()
    assert "differ only in what is left out" in text and "111" not in text


def test_the_directory_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    side = Side(tmp_path / "diffs", max_bytes=15_000, max_files=5)
    (tmp_path / "diffs" / "notes.txt").write_text("x" * 10_000)
    names = []
    for i in range(12):
        side.ask(body(f"a {i}"))
        names.append(side.last()[0].diff if i else None)
    left = sorted(path.name for path in (tmp_path / "diffs").glob("*.diff"))
    assert left == sorted(filter(None, names))[-5:]
    for i in range(12):
        side.ask(body(f"{i} " * 400))
        side.last()
        files = list((tmp_path / "diffs").glob("*.diff"))
        assert 0 < sum(path.stat().st_size for path in files) <= 15_000
    # What is not ours is left alone.
    assert (tmp_path / "diffs" / "notes.txt").stat().st_size == 10_000


def test_what_cannot_be_written_costs_the_file_only(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    side.ask(body("a"))
    assert side.directory is not None and side.diffs is not None
    side.directory.rmdir()
    side.ask(body("b"))
    side.diffs.flush()
    assert side.diagnoser.breaks.recent(None)[0].diagnosis.cause == "system_changed"
    assert "could not be written" in caplog.text


def test_another_sessions_texts_are_not_compared(side: Side) -> None:
    side.ask(body("a"))
    side.ask(body("b"), Caller("acme", "other"))
    side.ask(body("b"), Caller("other", "s"))
    assert all(seen.diff is None for seen in side.diagnoser.breaks.recent(None))


def test_texts_are_forgotten_with_their_session(side: Side) -> None:
    side.ask(body(PLANTED))
    assert [text for text in strings_behind(side.diagnoser) if PLANTED in text]
    side.now += prompt_texts.DEFAULT_TTL_S
    side.ask(body("later"), Caller("acme", "other"))
    assert not [text for text in strings_behind(side.diagnoser) if PLANTED in text]


def test_a_purge_takes_texts_and_files(side: Side) -> None:
    for caller in (ACME, Caller("acme", "t"), Caller("other", "s")):
        side.ask(body(f"{PLANTED} 1"), caller)
        side.ask(body(f"{PLANTED} 2"), caller)
    assert side.directory is not None and side.diffs is not None
    for org, session, left in (("acme", "s", 2), ("acme", None, 1), (None, None, 0)):
        side.diagnoser.purge(org, session)
        side.diffs.flush()
        assert len(list(side.directory.iterdir())) == left
    assert not [text for text in strings_behind(side.diagnoser) if PLANTED in text]


def test_a_damaged_file_keeps_no_other_from_a_purge(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    assert side.directory is not None and side.diffs is not None
    for i, data in enumerate((b"", b"# []", b"\xff{")):
        (side.directory / f"0-{i:08}.diff").write_bytes(data)
    side.ask(body("a"))
    side.ask(body("b"))
    side.last()
    side.diagnoser.purge("acme")
    side.diffs.flush()
    assert sorted(path.name for path in side.directory.iterdir()) == [
        f"0-{i:08}.diff" for i in range(3)
    ]
    assert caplog.text.count("could not be deleted") == 3
    side.diagnoser.purge(None)
    side.diffs.flush()
    assert not list(side.directory.iterdir())


def test_what_could_not_be_finished_is_removed(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    side.ask(body("a"))
    assert side.directory is not None and side.diffs is not None
    monkeypatch.setattr(module, "open", Full, raising=False)
    side.ask(body("b"))
    side.diffs.flush()
    assert not list(side.directory.iterdir())


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_texts, "KEPT_BYTES", 20_000)
    side = Side(tmp_path / "diffs")
    assert side.diffs is not None
    for i in range(40):
        side.ask(body(str(i)), Caller("acme", str(i)))
        assert 0 < side.diffs.texts.nbytes <= 20_000
    side.diffs.purge(None)
    assert side.diffs.texts.nbytes == 0


def test_none_pushes_out_the_texts_of_another_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up organisations are one account together."""
    monkeypatch.setattr(prompt_texts, "KEPT_BYTES", 20_000)
    listed = Caller("name:acme", "s")
    texts = PromptTexts((), lambda: 0.0, lambda org: org if org == listed.org else "unlisted")
    made = Fingerprinter(b"a secret of tests")

    def keep(caller: Caller, name: str) -> Fingerprint:
        request = READERS[Protocol.MESSAGES](body(name), (300, 3600))
        texts.keep(caller, request, made(request))
        return made(request)

    kept = keep(listed, "of acme")
    for i in range(60):
        keep(Caller(f"key:{i}", str(i)), str(i))
    assert texts.nbytes > 15_000
    assert texts.find(listed, kept.static_hashes) is not None
    texts.purge(None)
    assert texts.nbytes == len(texts) == 0


@pytest.mark.parametrize(
    ("blocks", "requests"),
    [([f"{i:03}" for i in range(256)], 40), (["\U0001f600" * 190_000], 3)],
    ids=["tiny blocks", "wide characters"],
)
def test_what_is_counted_is_what_is_taken(blocks: list[str], requests: int) -> None:
    raw = json.dumps(body() | {"system": [{"type": "text", "text": text} for text in blocks]})
    fingerprinter = Fingerprinter(b"a secret of tests")
    tracemalloc.start()
    try:
        texts = PromptTexts((), lambda: 0.0)
        for i in range(requests):
            # Read anew each time, since a text may be one with the request's.
            request = READERS[Protocol.MESSAGES](json.loads(raw), (300, 3600))
            fingerprint = fingerprinter(request)
            texts.keep(Caller("acme", f"session {i}"), request, fingerprint)
        before, _ = tracemalloc.get_traced_memory()
        counted = texts.nbytes
        del texts
        gc.collect()
        taken = before - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.6 < counted / taken < 1.6, counted


@pytest.mark.parametrize("name", ["one line", "many lines", "repeated lines", "at signs", "keys"])
def test_hostile_texts_take_bounded_time(side: Side, name: str) -> None:
    texts = {
        "one line": ("a" * 10**6, "a" * 10**6),
        "many lines": ("\n".join(map(str, range(10**5))), "\n".join(map(str, range(10**5)[::-1]))),
        "repeated lines": ("\n".join("abcdefghij" * 10**5), "\n".join("jihgfedcba" * 10**5)),
        "at signs": ("a@" * 10**6, "@a." * 10**6),
        "keys": ("-----BEGIN PRIVATE KEY-----" * 10**5, "token" * 10**5 + "eyJ" * 10**5),
    }
    before, after = texts[name]
    begun = time.process_time()
    side.ask(body("x" + before))
    side.ask(body("y" + after))
    assert side.diffs is not None
    side.diffs.flush()
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("name", ["deep tools", "long tools", "one letter", "at signs"])
def test_a_hostile_body_takes_bounded_time(side: Side, name: str) -> None:
    deep: Any = 1
    for _ in range(180):
        deep = {"a": deep}
    bodies: dict[str, dict[str, Any]] = {
        "deep tools": {"tools": [{"name": f"{i}", "input_schema": deep} for i in range(512)]},
        "long tools": {"tools": [{"name": f"{i}", "enum": [[]] * 20_000} for i in range(100)]},
        "one letter": {
            "system": [{"type": "text", "text": f"{'a_' * 10**5}{i}"} for i in range(90)]
        },
        "at signs": {"system": [{"type": "text", "text": f"{i}{'a@' * 10**5}"} for i in range(90)]},
    }
    request = READERS[Protocol.MESSAGES]({**body(), **bodies[name]}, (300, 3600))
    fingerprint = Fingerprinter(b"a secret of tests")(request)
    assert side.diffs is not None
    begun = time.process_time()
    side.diffs.texts.keep(ACME, request, fingerprint)
    assert time.process_time() - begun < 0.5
    assert len(side.diffs.texts)


def test_what_one_request_leaves_the_next_takes_in(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = body()
    # Of one tool, both the name and the text of a field are as long as what is kept of it.
    asked["tools"].append({"a" * 199_000: "b" * 200_000})
    asked["system"] = [{"type": "text", "text": f"{i}" * 150_000} for i in range(3)]
    assert side.diffs is not None
    taken = []
    for _ in range(5):
        side.ask(asked)
        taken.append(len(side.diffs.texts))
    assert taken == [2, 3, 4, 5, 5]
    monkeypatch.setattr(Redaction, "redact", None)  # What is known costs nothing.
    side.ask(asked)


def strings_behind(root: object) -> Iterator[str]:
    """Yield every text that ``root`` keeps alive, bytes as text."""
    for item in reachable(root):
        if isinstance(item, str):
            yield item
        elif isinstance(item, bytes | bytearray):
            yield item.decode("latin-1")


def test_without_diffs_no_text_is_kept(tmp_path: Path) -> None:
    for directory in (None, tmp_path / "diffs"):
        side = Side(directory)
        for i in range(3):
            asked = body(f"{PLANTED} {i}", f"{PLANTED} {i}")
            asked["messages"][0]["content"] += PLANTED
            side.ask(asked)
        kept = [text for text in strings_behind(side.diagnoser) if PLANTED in text]
        # The search is one that finds something where there is something to be found.
        assert bool(kept) == (directory is not None)
