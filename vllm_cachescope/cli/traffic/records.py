"""The JSON values in a file, one after the other, with the line at which each begins.

As a rule a file has one value a line. A document may also be printed over many lines, hold several
values, or one array of them; which it is shows at its first line. A line that is no JSON is left
out where others can be read.
"""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from vllm_cachescope.cli.traffic.call import LeftOut, TrafficError

STANDARD_INPUT = Path("-")

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


def read_records(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    """Yield each JSON value in a file with its source, as in ``traffic.jsonl:12``; of an array each
    element.

    Args:
        path: the file, gzipped if its name ends in ``.gz``; ``-`` for standard input.
        left_out: takes the lines that are no JSON.

    Raises:
        OSError: if the file cannot be read.
        TrafficError: if it is no gzip file, or a damaged one.
    """
    with _opened(path) as opened:
        lines = _lines(opened, path)
        first = next((one for one in enumerate(lines, 1) if one[1].strip()), None)
        if first is None:
            return
        number, raw = first
        raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.lstrip()[:1] in (b"{", b"[") and _parsed(raw) is None:
            document = b"".join(chain((raw,), lines))
            whole = list(_document(document, number, path, left_out))
            if whole:
                yield from whole
                return
            lines = iter(document.splitlines(keepends=True))
            raw = next(lines)
        for line, data in enumerate(chain((raw,), lines), number):
            if data.strip():
                yield from _line(f"{path}:{line}", data, left_out)


def _line(source: str, data: bytes, left_out: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    try:
        value = _decoded(data)
    except (ValueError, RecursionError) as error:
        cut = "" if data.endswith(b"\n") else " (the file ends within it)"
        left_out.append(LeftOut(source, f"not JSON{cut}: {error}"))
        return
    if isinstance(value, list):
        yield from ((f"{source}#{i}", item) for i, item in enumerate(value, 1))
    else:
        yield source, value


def _decoded(data: bytes) -> Any:
    """Return the JSON value in ``data``.

    Raises:
        ValueError, RecursionError: if it is none.
    """
    try:
        return msgspec.json.decode(data)  # Twice as fast as the standard library, and strict.
    except (RecursionError, ValueError):
        return json.loads(data.decode("utf-8", "surrogateescape"))


def _parsed(data: bytes) -> Any:
    try:
        return _decoded(data)
    except (ValueError, RecursionError):
        return None


def _document(
    data: bytes, number: int, path: Path, left_out: list[LeftOut]
) -> Iterator[tuple[str, Any]]:
    """Yield the values of a document that is not one value a line; nothing if it is no JSON.

    Args:
        data: the document.
        number: the line at which it begins.
        path: its file.
        left_out: takes the value at which the document was cut off.
    """
    text = data.decode("utf-8", "surrogateescape")
    found: list[tuple[str, Any]] = []
    at = _skip(text, 0)
    inside = text[at : at + 1] == "["
    at = _skip(text, at + inside)
    counted = 0
    try:
        while at < len(text) and not (inside and text[at] == "]"):
            number += text.count("\n", counted, at)
            counted = at
            value, at = _DECODER.raw_decode(text, at)
            found.append((f"{path}:{number}", value))
            at = _skip(text, at)
            if inside and text[at : at + 1] == ",":
                at = _skip(text, at + 1)
    except (ValueError, RecursionError) as error:
        # An array that was cut off, or objects of which the last one was, still hold what is whole.
        if len(found) < 2:
            return
        left_out.append(LeftOut(f"{path}:{number}", f"not JSON: {error}"))
    yield from found


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _opened(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    if path == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrafficError(f"{path}: {error}") from None
