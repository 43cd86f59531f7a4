"""An edit: how one version of a part became the other, down to the character.

The same place may change for quite different reasons, each with a remedy of its own: other spaces,
other ids, a time. Two versions are compared as JSON values, and their texts character by character.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vllm_cachescope.cli.volatile import volatile_values
from vllm_cachescope.diagnosis.canonical import json_bytes, without_ids
from vllm_cachescope.prompt.boundaries import common_prefix

_MAX_DEPTH = 64
_MAX_VALUE = 120  # characters of a value that is another one each time
_LONGEST = 50_000  # characters of a text that is searched for several values
_LONG = 200  # characters of what may be shortened
_NUMBER = re.compile(r"[0-9A-Fa-f-]*[0-9][0-9A-Fa-f-]*")
_WORD = re.compile(r"[\w:.+/-]")


class EditKind(StrEnum):
    """What an edit amounts to."""

    KEYS = "the same keys in another order"
    LISTS = "the same list in another order"
    IDS = "other ids, and nothing else"
    SPACES = "other spaces or line breaks, and nothing else"
    UNICODE = "the same characters in another Unicode form"
    VALUE = "another value in the same place"
    CUT = "shortened"
    GREW = "text was added at its end"
    TEXT = "another text"


@dataclass(frozen=True, slots=True)
class Edit:
    """How a part was edited.

    Attributes:
        kind: what it amounts to.
        inside: where in the part the first difference is, as in ``.input_schema.required``; empty
            for the part itself.
        before: the text there, or its JSON, as it was.
        after: as it is now.
        char: how many leading characters the two share.
    """

    kind: EditKind
    inside: str
    before: str
    after: str
    char: int


def edit_of(old: Any, new: Any) -> Edit:
    """Return the edit that made the content ``new`` of the content ``old``."""
    inside, before, after = _first_difference(old, new)
    was, now = _text_of(before), _text_of(after)
    return Edit(_kind(old, new, was, now), inside, was, now, common_prefix(was, now))


def _kind(old: Any, new: Any, was: str, now: str) -> EditKind:
    for kind, even in _EVENED:
        if _same(even(old), even(new)):
            return kind
    if _is_value(was, now):
        return EditKind.VALUE
    if now.startswith(was) and was:
        return EditKind.GREW
    if len(was) >= _LONG and 2 * len(now) <= len(was):
        return EditKind.CUT
    return EditKind.TEXT


def _same(old: Any, new: Any) -> bool:
    return json_bytes(old) == json_bytes(new)


def _sorted_keys(value: Any, depth: int = 0) -> Any:
    return _mapped(value, lambda one: one, keys=True, depth=depth)


def _sorted_lists(value: Any) -> Any:
    return _mapped(value, lambda one: one, keys=True, lists=True)


def _bare(value: Any) -> Any:
    return _sorted_keys(without_ids(value))


def _spaced(value: Any) -> Any:
    return _mapped(value, lambda text: "".join(text.split()))


def _composed(value: Any) -> Any:
    return _mapped(value, lambda text: unicodedata.normalize("NFKC", text))


_EVENED: tuple[tuple[EditKind, Callable[[Any], Any]], ...] = (
    (EditKind.KEYS, _sorted_keys),
    (EditKind.LISTS, _sorted_lists),
    (EditKind.SPACES, _spaced),
    (EditKind.UNICODE, _composed),
    (EditKind.IDS, _bare),
)


def _mapped(
    value: Any,
    even: Callable[[str], str],
    keys: bool = False,
    lists: bool = False,
    depth: int = 0,
) -> Any:
    """Return ``value`` with its texts evened out, and its keys and lists of texts sorted if so
    asked."""
    if isinstance(value, str):
        return even(value)
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        names = sorted(value, key=str) if keys else list(value)
        return {str(k): _mapped(value[k], even, keys, lists, depth + 1) for k in names}
    if isinstance(value, list):
        items = [_mapped(one, even, keys, lists, depth + 1) for one in value]
        return sorted(items, key=str) if lists and _are_scalars(items) else items
    return value


def _are_scalars(items: list[Any]) -> bool:
    return all(one is None or isinstance(one, str | int | float) for one in items)


def _first_difference(old: Any, new: Any) -> tuple[str, Any, Any]:
    """Return where two JSON values first differ, and what stands there in each.

    Where their keys differ, that is the object.
    """
    path = ""
    for _ in range(_MAX_DEPTH):
        if isinstance(old, Mapping) and isinstance(new, Mapping) and list(old) == list(new):
            key = next((key for key in old if not _same(old[key], new[key])), None)
            step = f".{key}"
        elif isinstance(old, list) and isinstance(new, list):
            if _are_scalars(old) and _are_scalars(new):
                break
            pairs = zip(old, new, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if not _same(a, b)), None)
            key, step = at, f"[{at}]"
        else:
            break
        if key is None:
            break
        old, new, path = old[key], new[key], path + step
    # A text block is its text.
    return ("" if path == ".text" else path), old, new


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json_bytes(value).decode("utf-8", "replace")


def _is_value(was: str, now: str) -> bool:
    """Whether nothing but values differ that look as though they were made anew each time."""
    head = common_prefix(was, now)
    tail = common_prefix(was[head:][::-1], now[head:][::-1])
    old, new = was[head : len(was) - tail], now[head : len(now) - tail]
    if max(len(old), len(new)) <= _MAX_VALUE:
        while head and _WORD.match(was[head - 1]):
            head -= 1
        end = len(was) - tail
        while end < len(was) and _WORD.match(was[end]):
            end += 1
        value, other = was[head:end], now[head : end + len(now) - len(was)]
        if _NUMBER.fullmatch(value) and _NUMBER.fullmatch(other):
            return True
        masked = _NUMBER.sub("0", value)
        if value and masked == _NUMBER.sub("0", other):
            return True
    if max(len(was), len(now)) > _LONGEST:
        return False
    # Several values, one beside the other or far apart.
    ours, theirs = volatile_values(now), volatile_values(was)
    if not ours or len(ours) != len(theirs):
        return False
    for _, text in theirs:
        was = was.replace(text, "0")
    for _, text in ours:
        now = now.replace(text, "0")
    return was == now
