"""Diffs of the tools and system blocks that broke a prefix, for an operator who turned them on.

The one place that writes prompt text. The text is redacted before it is kept (`PromptTexts`).
"""

import difflib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_cachescope.api.prompt_texts import PromptTexts
from vllm_cachescope.config import ConfigError, DiffSettings
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.scope import Caller

MAX_LINES = 1000
"""Lines compared of one tool or system block, from the first that differs."""

MAX_CHANGES = 10
"""Changes that one file shows."""

MAX_UNWRITTEN = 16
"""Files that may wait to be written; further ones are dropped."""

SUFFIX = ".diff"

_NAME = re.compile(r"[0-9]{8}T[0-9]{12}-[0-9a-f]{8}\.diff")

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

logger = logger_of(__name__)


class Diffs:
    """Writes what changed in tools and system blocks, each diff to a file of its own.

    Files are written and deleted on a thread of their own; what goes wrong there is logged.

    Args:
        settings: the directory, its limits, and what to leave out.
        clock: seconds, never running backwards.

    Attributes:
        texts: the texts to compare; a text has to be kept there first.

    Raises:
        ConfigError: if the directory cannot be used.
    """

    def __init__(self, settings: DiffSettings, clock: Callable[[], float]) -> None:
        self._directory = settings.directory
        self._max_bytes = int(settings.max_bytes)
        self._max_files = settings.max_files
        self.texts = PromptTexts(settings.redact, clock)
        self._unwritten = threading.Semaphore(MAX_UNWRITTEN)
        self._pool = ThreadPoolExecutor(1, "cachescope-diffs")
        _prepare(settings)

    def write(
        self, caller: Caller, changes: Iterable[Change], at: float, details: dict[str, Any]
    ) -> str | None:
        """Write a diff of what changed to a file of its own.

        Args:
            caller: whose request changed.
            changes: what changed in it, against the request that it was compared with.
            at: when the request was over, in seconds since the epoch.
            details: what the file's first line says besides the caller and the time.

        Returns:
            The file's name; None if there is no text to compare.
        """
        found = (
            (change, before, after)
            for change in changes
            if change.kind in _KINDS
            and (before := self.texts.find(caller, change.old_value)) is not None
            and (after := self.texts.find(caller, change.value)) is not None
        )
        pairs = list(islice(found, MAX_CHANGES))
        if not pairs or not self._unwritten.acquire(blocking=False):
            return None
        moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%S%f")
        name = f"{moment}-{secrets.token_hex(4)}{SUFFIX}"
        head = {"at": at, "org": caller.org, "session": caller.session, **details}
        self._pool.submit(self._save, name, head, pairs)
        return name

    def read(self, name: str) -> str | None:
        """Return what the file called ``name`` says, as `write` has named it; None if there is no
        such file, or not any more."""
        if not _NAME.fullmatch(name):
            return None
        try:
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, encoding="utf-8", errors="replace") as file:
                return file.read(self._max_bytes)
        except OSError:
            return None

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the texts and delete the files of ``org``, or of one session of ``org``; with None,
        of everyone."""
        self.texts.purge(org, session)
        self._pool.submit(self._delete, org, session)

    def flush(self) -> None:
        """Wait until everything is written and deleted that was to be."""
        self._pool.submit(lambda: None).result()

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
            self._unwritten.release()

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
                # A purge of everything also deletes files whose owner cannot be read.
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


def _prepare(settings: DiffSettings) -> None:
    try:
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"diffs.directory: {settings.directory} cannot be made: {error}"
        ) from None
    settings.check()


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
