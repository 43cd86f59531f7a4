"""The numbers in a text: what tells a head of yesterday from one of today, where only they change.

A replica that gets a session's head with other numbers puts those in which it had first, and needs
no text for it.
"""

import hashlib
import re

MAX_NUMBERS = 256
"""Characters of all numbers of a text that are told of."""

_NUMBER = re.compile("([0-9]+)")

_DIGEST_BYTES = 16


def numbers_of(text: str) -> bytes | None:
    """Return the numbers of a text, with a digest of what stands around them; None if there are too
    many."""
    parts = _NUMBER.split(text)
    numbers = ",".join(parts[1::2]).encode()
    return None if len(numbers) > MAX_NUMBERS else _around(parts) + numbers


def with_numbers(text: str, told: bytes) -> str | None:
    """Return a text with the numbers that `numbers_of` has told; None if they were told of a text
    that differs in more than its numbers."""
    parts, numbers = _NUMBER.split(text), told[_DIGEST_BYTES:].decode("ascii", "replace")
    if told[:_DIGEST_BYTES] != _around(parts):
        return None
    first = numbers.split(",") if numbers else []
    if len(first) != len(parts) // 2 or not all(_NUMBER.fullmatch(number) for number in first):
        return None
    parts[1::2] = first
    return "".join(parts)


def _around(parts: list[str]) -> bytes:
    return hashlib.blake2b("0".join(parts[::2]).encode(), digest_size=_DIGEST_BYTES).digest()
