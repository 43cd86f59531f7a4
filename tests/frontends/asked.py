"""What these tests ask of every front end: which tokens are read, on which tier, by whom."""

import random
from collections.abc import Callable

from tests.engine.engine import BLOCK, draw_tokens

LENGTH, WHOLE = 10 * BLOCK + 9, 10 * BLOCK
"""A prompt's length, and how much of it is cached, in tokens."""

Read = Callable[[list[int]], int]
"""Puts a prompt to the front end; returns how many of its tokens were read."""


def assert_reads_what_plain_vllm_reads(read: Read, chance: random.Random) -> None:
    """Four sessions of three turns each: a turn reads the whole blocks of the one before it."""
    system = draw_tokens(chance, 5 * BLOCK)
    sessions = [[*system, *draw_tokens(chance, 100)] for _ in range(4)]
    seen: list[list[int]] = []
    for _ in range(3):
        for tokens in sessions:
            expected = max((_common(tokens, other) for other in seen), default=0)
            assert read(tokens) == expected
            seen.append(list(tokens))
            tokens += draw_tokens(chance, BLOCK)


def assert_is_read_from_memory(read: Read, chance: random.Random) -> None:
    """What the device had to give up, for want of room, is read from the CPU tier."""
    tokens = draw_tokens(chance, LENGTH)
    assert [read(tokens), read(tokens)] == [0, WHOLE]
    for _ in range(5):
        assert read(draw_tokens(chance, LENGTH)) == 0
    assert read(tokens) == WHOLE


def _common(tokens: list[int], other: list[int]) -> int:
    """Return how many leading tokens are the same, in whole blocks. The last token is computed."""
    pairs = zip(tokens[:-1], other, strict=False)
    same = next((i for i, (one, another) in enumerate(pairs) if one != another), None)
    if same is None:
        same = min(len(tokens) - 1, len(other))
    return same // BLOCK * BLOCK
