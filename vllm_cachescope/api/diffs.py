"""Diffs of the tools and system blocks that broke a prefix, for an operator who turned them on.

The one place that keeps prompt text, and the one that writes any. What is kept is redacted first.
"""

import difflib
import json
import os
import re
import secrets
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_cachescope.config import ConfigError, DiffSettings
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.lineage_store import DEFAULT_TTL_S
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.request import PromptRequest, Region
from vllm_cachescope.tenancy.scope import Caller

KEPT_BYTES = 64 * 2**20
"""Memory for texts, of all organisations together, in bytes."""

ENTRY_BYTES = 240
"""Memory that a text takes besides itself and its session's name: its key with the hash, the time
of its last use, and its place in the table."""

MAX_CHARACTERS = 200_000
"""Kept of one tool or system block."""

MAX_NEW_CHARACTERS = 2**18
"""Taken in with one request, which waits for it; what is left is, with the next that has it."""

MAX_DEPTH = 32
"""Levels of a tool that are kept; of a list or an object below them, that there is one."""

MAX_LINES = 1000
"""Compared of one tool or system block: those after the first that differs."""

MAX_CHANGES = 10
"""Diffs in one file."""

MAX_PENDING = 16
"""Files that wait to be written; further ones are dropped."""

SUFFIX = ".diff"
REDACTED = "[redacted]"

# A first letter is spelled in both cases, and the rest ignores case: the engine of `re` can then
# skip to it, which takes a quarter of the time.
_NAME = (
    r"[ACPSTacpst](?i:(?:pi|ccess|ccount|rivate|ecret|igning|hared)[ _-]?keys?|oken|ecrets?"
    r"|ass(?:wo?r)?ds?|assphrase|wd|uthorization|redentials?|ookie)"
)

# None reads far and then fails, or far again from the next character on: a client must not be
# able to make these slow. Strings of a tool stand in the text as they are, but a string may
# itself hold JSON, hence the backslashes.
_SECRETS = (
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\\rn]{1,8}[A-Z][A-Za-z-]{2,20}:[^\n\\]{0,200}){0,4}"
    r"[\s\\A-Za-z0-9+/=]{0,16000}(?:-----END[A-Z -]{0,60})?",
    r"eyJ[\w-]{8,}(?:\.[\w-]+){0,2}",
    r"://[^\s/@\"'<>]{1,1000}+@",
    r"\b(?:(?:sk|pk|rk|xox[abprs]|gh[opsu]|github_pat|glpat|npm|hf|key)[-_]|AKIA|ASIA|AIza)"
    r"[\w-]{12,}",
    r"[Bb](?i:(?<=\bb)(?:earer|asic))\s{1,8}[\w.~+/=-]{8,}",
    _NAME + r"\\{0,3}[\"']?\s{0,8}[:=>]{1,2}\s{0,8}"
    r"(?:\\{0,3}\"[^\"\n]{6,}|\\{0,3}'[^'\n]{6,}|[^\s\"',;]{6,})",
    r"(?<![\w.%+-])[\w.%+-]++@[\w-]+(?:\.[\w-]+){1,8}",
)

_SECRET_FIELD = re.compile(_NAME + r"\d{0,4}$")
_SHOWN_FIELDS = frozenset({"type", "title", "description", "format"})
"""Of a schema, shown even where its name is that of a secret."""

_KINDS = frozenset(
    {
        ChangeKind.TOOL_CHANGED,
        ChangeKind.TOOL_KEYS_REORDERED,
        ChangeKind.SYSTEM_ADDED,
        ChangeKind.SYSTEM_REMOVED,
        ChangeKind.SYSTEM_CHANGED,
        ChangeKind.SYSTEM_REORDERED,
    }
)

_CONTEXT = 3
_PART = 256  # least cost of a part, in characters
_PIECE = 32  # least cost of a number, a name or a bracket in a tool, in characters

logger = logger_of(__name__)

_Key = tuple[str, str | None, bytes]


class Diffs:
    """Keeps the texts of tools and system blocks, and writes what changed in them.

    Files are written on a thread of its own; what goes wrong there is logged.

    Args:
        settings: where to, how much, and what to leave out.
        clock: seconds, never running backwards.

    Raises:
        ConfigError: if the directory cannot be used.
    """

    def __init__(self, settings: DiffSettings, clock: Callable[[], float]) -> None:
        self._directory = settings.directory
        self._max_bytes = int(settings.max_bytes)
        self._max_files = settings.max_files
        self._rules = [re.compile(rule) for rule in (*_SECRETS, *settings.redact)]
        self._clock = clock
        # Least recently used first, each with when that was.
        self._texts: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._kept_bytes = 0
        self._pending = threading.Semaphore(MAX_PENDING)
        self._pool = ThreadPoolExecutor(1, "cachescope-diffs")
        _prepare(self._directory)

    def keep(self, caller: Caller, request: PromptRequest, fingerprint: Fingerprint) -> None:
        """Keep the texts of a request's tools and system blocks, for as long as a session is.

        Args:
            caller: whose they are.
            request: the request.
            fingerprint: its fingerprint, by whose hashes the texts are found again.
        """
        now = self._clock()
        by_path = {part.path: part for part in request.parts if part.region < Region.MESSAGES}
        paths = fingerprint.paths.split("\n", fingerprint.static_parts)
        left = MAX_NEW_CHARACTERS
        for i, path in enumerate(paths[: fingerprint.static_parts]):
            key = (caller.org, caller.session, fingerprint.hash(i))
            known = self._texts.pop(key, None)
            if known is not None:
                self._texts[key] = known[0], now
            elif left > 0 and (part := by_path.get(path)) is not None:
                text, cost = _text(part.content)
                left -= cost
                if left < 0:
                    continue
                text = self._redacted(text)
                self._texts[key] = text, now
                self._kept_bytes += _nbytes(key, text)
        while self._texts:
            oldest = next(iter(self._texts))
            _, used = self._texts[oldest]
            if self._kept_bytes <= KEPT_BYTES and used + DEFAULT_TTL_S > now:
                break
            self._drop(oldest)

    def write(
        self, caller: Caller, changes: Iterable[Change], at: float, details: dict[str, Any]
    ) -> str | None:
        """Write a diff of what changed to a file of its own.

        Args:
            caller: whose request changed.
            changes: what changed in it, against the request that it was compared with.
            at: when, in seconds since the epoch.
            details: what to write on top of it, besides the caller and the time.

        Returns:
            The file's name; None if there is no text to compare.
        """
        found = (
            (change, before, after)
            for change in changes
            if change.kind in _KINDS
            and (before := self._find(caller, change.old_value)) is not None
            and (after := self._find(caller, change.value)) is not None
        )
        pairs = list(islice(found, MAX_CHANGES))
        if not pairs or not self._pending.acquire(blocking=False):
            return None
        moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%S%f")
        name = f"{moment}-{secrets.token_hex(4)}{SUFFIX}"
        head = {"at": at, "org": caller.org, "session": caller.session, **details}
        self._pool.submit(self._save, name, head, pairs)
        return name

    def forget(self, org: str | None, session: str | None = None) -> None:
        """Forget the texts and delete the files of ``org``, or of one session of it, or all."""
        for key in list(self._texts):
            if org in (None, key[0]) and session in (None, key[1]):
                self._drop(key)
        self._pool.submit(self._delete, org, session)

    def flush(self) -> None:
        """Wait until what was to be written or deleted is."""
        self._pool.submit(lambda: None).result()

    def _find(self, caller: Caller, hashes: bytes) -> str | None:
        texts = []
        for at in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
            key = (caller.org, caller.session, hashes[at : at + HASH_BYTES])
            if (known := self._texts.get(key)) is None:
                return None
            texts.append(known[0])
        return "\n".join(texts)

    def _drop(self, key: _Key) -> None:
        text, _ = self._texts.pop(key)
        self._kept_bytes -= _nbytes(key, text)

    def _redacted(self, text: str) -> str:
        for rule in self._rules:
            text = rule.sub(REDACTED, text)
        return text

    # On the thread that writes.

    def _save(
        self, name: str, head: dict[str, Any], pairs: Sequence[tuple[Change, str, str]]
    ) -> None:
        try:
            lines = [f"# {json.dumps(head)}"]
            for change, before, after in pairs:
                lines += ["", f"# {change}".splitlines()[0], *_diff(change.path, before, after)]
            data = "\n".join([*lines, ""]).encode("utf-8", "replace")[: self._max_bytes]
            self._make_room(len(data))
            self._create(self._directory / name, data)
        except Exception as error:
            logger.warning("The diff %s could not be written: %s", name, error)
        finally:
            self._pending.release()

    def _create(self, path: Path, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError:
            # Half a file may lack the line that says whose it is.
            path.unlink(missing_ok=True)
            raise

    def _make_room(self, nbytes: int) -> None:
        files = [(path, path.stat().st_size) for path in self._files()]
        used, count = sum(size for _, size in files), len(files)
        for path, size in files:
            if used + nbytes <= self._max_bytes and count < self._max_files:
                return
            path.unlink(missing_ok=True)
            used, count = used - size, count - 1

    def _delete(self, org: str | None, session: str | None) -> None:
        for path in self._files():
            try:
                # Where all is purged, so is what nobody can say the owner of.
                if (org, session) != (None, None):
                    with open(path, encoding="utf-8", errors="replace") as file:
                        head = json.loads(file.readline().removeprefix("# "))
                    if org not in (None, head["org"]) or session not in (None, head["session"]):
                        continue
                path.unlink(missing_ok=True)
            except Exception as error:
                logger.warning("The diff %s could not be deleted: %s", path.name, error)

    def _files(self) -> list[Path]:
        """Return the files of ours, the oldest first."""
        return sorted(self._directory.glob(f"*-????????{SUFFIX}"))


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(directory.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"diffs.directory: {directory} cannot be made: {error}") from None
    if mode & 0o077:
        raise ConfigError(
            f"diffs.directory: {directory} is open to others (mode {mode:o}); allowed: 700"
        )
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"diffs.directory: {directory} cannot be written to")


def _nbytes(key: _Key, text: str) -> int:
    """Return about how much memory a text takes, in bytes, a session's name counted with each."""
    return ENTRY_BYTES + sys.getsizeof(key[1]) + sys.getsizeof(text)


def _text(content: Any) -> tuple[str, int]:
    """Return a tool or a system block as text of many short lines, and what it cost.

    The cost is in characters of a long text that take as much time, redaction included.
    """
    if isinstance(content, dict) and len(content) == 2 and isinstance(content.get("text"), str):
        content = content["text"]
    if isinstance(content, str):
        text = content[:MAX_CHARACTERS]
        return text, _PART + len(text)
    pieces, cost = [], 0
    for piece in _pieces(content):
        pieces.append(piece)
        cost += max(len(piece), _PIECE)
        if cost >= MAX_CHARACTERS:
            break
    return "".join(pieces)[:MAX_CHARACTERS], _PART + min(cost, MAX_CHARACTERS)


def _pieces(value: Any, line: str = "\n", hidden: bool = False) -> Iterator[str]:
    """Yield ``value`` as JSON with an indent, except that strings are not escaped.

    Escapes would hide a secret from the patterns, and hinder whoever reads a diff of long texts.

    Args:
        value: what JSON can hold.
        line: a line break, and the indent of the line that the value begins on.
        hidden: whether it is a secret by the name of a field that it is in.
    """
    if isinstance(value, str):
        yield f'"{REDACTED if hidden else value[:MAX_CHARACTERS]}"'
    elif not isinstance(value, dict | list) or not value:
        yield REDACTED if hidden and type(value) in (int, float) else json.dumps(value)
    elif len(line) > 2 * MAX_DEPTH:
        yield "(nested too deeply to be shown)"
    elif isinstance(value, dict):
        for i, (key, inner) in enumerate(value.items()):
            name = key[:MAX_CHARACTERS]
            yield f'{"," if i else "{"}{line}  "{name}": '
            secret = _SECRET_FIELD.search(name) or (hidden and name not in _SHOWN_FIELDS)
            yield from _pieces(inner, f"{line}  ", bool(secret))
        yield f"{line}}}"
    else:
        for i, inner in enumerate(value):
            yield f"{',' if i else '['}{line}  "
            yield from _pieces(inner, f"{line}  ", hidden)
        yield f"{line}]"


def _diff(path: str, before: str, after: str) -> Iterator[str]:
    if before == after:
        yield "(the two differ only in what is left out here)"
        return
    old, new = before.split("\n"), after.split("\n")
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    first = max(0, (min(len(old), len(new)) if same is None else same) - _CONTEXT)
    # Comparing takes time that grows with the square of the number of lines.
    if len(old) > MAX_LINES or len(new) > MAX_LINES:
        yield f"(from line {first + 1} on, {MAX_LINES} lines at most)"
        old, new = old[first : first + MAX_LINES], new[first : first + MAX_LINES]
    names = f"{path} before", f"{path} now"
    yield from difflib.unified_diff(old, new, *names, n=_CONTEXT, lineterm="")
