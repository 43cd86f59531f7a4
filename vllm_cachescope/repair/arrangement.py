"""The arrangement of a spelling: what tells it from others that say the same, in numbers alone.

A replica that gets another spelling of the same tool, or of a tool call's same input, makes the
first one of it again by its arrangement. There is no text in one: it says in which order keys and
sets stand, which fields are there that say what their absence says, and how JSON was written.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from vllm_cachescope.repair.spelling import DEFAULTS, packed, parsed_exactly, unpacked

MAX_ARRANGEMENT = 1024
"""Bytes of an arrangement: some 800 keys that do not stand in their alphabet's order."""

_MAX_DATA = 32 * 2**10
"""Bytes of a spelling whose arrangement is looked for: text is written in each style."""

_SCHEMAS = tuple(
    ("$schema", f"http{s}://json-schema.org/{draft}/schema{end}")
    for draft in ("draft-07", "draft/2020-12", "draft/2019-09", "draft-06", "draft-04")
    for s in ("", "s")
    for end in ("", "#")
)

_SILENT = (
    *DEFAULTS.items(),
    *((name, None) for name in ("description", "strict", "parameters", "defer_loading")),
    *_SCHEMAS,
)
"""Fields that may say what their absence says, by number. New ones go to the end: replicas of
other versions read these numbers."""

_STYLES = tuple(
    json.JSONEncoder(separators=separators, ensure_ascii=ensure_ascii)
    for ensure_ascii in (True, False)
    for separators in ((", ", ": "), (",", ":"))
)
"""How programs write JSON, by number; as `_SILENT`."""

_Told = list[list[int]]


def arrangement_of(data: bytes, evened: bytes, is_text: bool) -> bytes:
    """Return the arrangement of a spelling.

    Args:
        data: the spelling: packed, or a JSON text.
        evened: what it is in any spelling, packed.
        is_text: whether ``data`` is a JSON text.

    Raises:
        ValueError: if numbers do not tell it, or not within `MAX_ARRANGEMENT`.
        RecursionError: if it is nested too deeply.
    """
    if len(data) > _MAX_DATA:
        raise ValueError("it is too long")
    told: _Told = []
    if is_text:
        text = data.decode()
        value = parsed_exactly(text)
        told.append([next((n for n, s in enumerate(_STYLES) if s.encode(value) == text), -1)])
    else:
        value = unpacked(data)
    try:
        _tell(value, unpacked(evened), told)
    except LookupError as error:
        raise ValueError(f"they say different things: {error}") from None
    while told and not told[-1]:
        told.pop()
    found = msgspec.msgpack.encode(told)
    if len(found) > MAX_ARRANGEMENT or arranged(evened, found, is_text) != data:
        raise ValueError("numbers do not tell it")
    return found


def arranged(evened: bytes, arrangement: bytes, is_text: bool) -> bytes:
    """Return the spelling that `arrangement_of` was asked for.

    Raises:
        ValueError: if the arrangement is of something else, or none at all.
        RecursionError: if it is nested too deeply.
    """
    try:
        told = msgspec.msgpack.decode(arrangement, type=_Told)
        style = _STYLES[told.pop(0)[0]] if is_text else None
        value = _arrange(unpacked(evened), iter(told))
        return packed(value) if style is None else style.encode(value).encode()
    except (IndexError, msgspec.MsgspecError) as error:
        raise ValueError(f"the arrangement is of something else: {error}") from None


def _tell(value: Any, evened: Any, told: _Told) -> None:
    """Tell how ``value`` is arranged, object by object and set by set; an empty list where that is
    as in ``evened``."""
    if isinstance(evened, dict):
        place = {key: number for number, key in enumerate(evened)}
        order = [
            place[key] if key in place else -1 - _SILENT.index((key, said))
            for key, said in value.items()
        ]
        told.append([] if order == list(range(len(evened))) else order)
        for key, said in evened.items():
            _tell(value[key], said, told)
    elif isinstance(evened, list) and any(isinstance(one, dict | list) for one in evened):
        for one, said in zip(value, evened, strict=True):
            _tell(one, said, told)
    elif isinstance(evened, list):
        places: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)
        for number, said in enumerate(evened):
            places[type(said).__name__, str(said)].append(number)
        order = [places[type(one).__name__, str(one)].popleft() for one in value]
        told.append([] if order == list(range(len(evened))) else order)


def _arrange(evened: Any, told: Iterator[list[int]]) -> Any:
    if isinstance(evened, dict):
        order = next(told, []) or range(len(evened))
        keys = list(evened)
        _check(order, len(keys))
        found = {key: _arrange(said, told) for key, said in evened.items()}
        return dict(
            (keys[number], found[keys[number]]) if number >= 0 else _SILENT[-1 - number]
            for number in order
        )
    if not isinstance(evened, list):
        return evened
    if any(isinstance(one, dict | list) for one in evened):
        return [_arrange(one, told) for one in evened]
    order = next(told, []) or range(len(evened))
    _check(order, len(evened))
    return [evened[number] for number in order]


def _check(order: Sequence[int], count: int) -> None:
    """Raise ValueError if not each of ``count`` is in ``order`` once."""
    if sorted(number for number in order if number >= 0) != list(range(count)):
        raise ValueError("the arrangement is of something else")
