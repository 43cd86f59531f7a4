"""Readers of the values in cache fields. A wrong value is named in `BadRequest` by its path."""

from collections.abc import Collection, Mapping
from typing import Any

from vllm_cachescope.durations import format_duration, parse_duration
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.tenancy.scope import Scope


def read_object(value: object, path: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """Return ``value``, which must be an object with no other keys than ``keys``.

    A key nobody knows is refused rather than skipped: a misspelt option would do nothing.

    Raises:
        BadRequest: if it is not.
    """
    if not isinstance(value, Mapping):
        raise BadRequest(path, value, "an object with " + ", ".join(keys))
    for key in value:
        if key not in keys:
            raise BadRequest(f"{path}.{_shown(key)}", value[key], keys)
    return value


def read_choice(value: object, path: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, which must be one of ``choices``.

    Raises:
        BadRequest: if it is not.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise BadRequest(path, value, choices)


def read_ttl(value: object, path: str, ttls: Collection[int]) -> int | None:
    """Return the seconds in the duration ``value``, one of ``ttls``; None for null.

    Raises:
        BadRequest: if it is no duration, or none of those allowed.
    """
    if value is None:
        return None
    try:
        seconds = parse_duration(value) if isinstance(value, str) else None
    except ValueError:
        seconds = None
    if seconds is None or seconds not in ttls:
        raise BadRequest(path, value, map(format_duration, sorted(ttls)))
    return seconds


def read_flag(value: object, path: str) -> bool:
    """Return the truth ``value``; False for null.

    Raises:
        BadRequest: if it is neither true nor false.
    """
    if value is not None and not isinstance(value, bool):
        raise BadRequest(path, value, ("true", "false"))
    return bool(value)


def read_scope(value: object, path: str) -> Scope | None:
    """Return the scope called ``value``; None for null.

    Raises:
        BadRequest: if there is no such scope.
    """
    if value is None:
        return None
    return Scope.parse(read_choice(value, path, tuple(scope.label for scope in Scope)))


def read_text(value: object, path: str) -> str | None:
    """Return the string ``value``; None for null and for the empty string.

    Raises:
        BadRequest: if it is not a string that UTF-8 can hold.
    """
    if value is None or value == "":
        return None
    if not is_text(value):
        raise BadRequest(path, value, "a string of Unicode text")
    return str(value)


def is_text(value: object) -> bool:
    """Tell whether ``value`` is a non-empty string that UTF-8 can hold.

    JSON can escape half of a surrogate pair, which makes a string that cannot be encoded.
    """
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(key: object) -> str:
    text = str(key)
    if text.isidentifier() and text.isascii() and len(text) <= 40:
        return text
    return ascii(text[:40])
