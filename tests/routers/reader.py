"""What the readers of KV events have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
"""An event as vLLM sends it from 0.26 on: a map with its ``type``."""


class Reader(ABC):
    """A router's index of what one engine holds.

    Args:
        block: tokens per block.
    """

    def __init__(self, block: int) -> None:
        self.block = block

    @abstractmethod
    def read(self, event: Event) -> None:
        """Bring the index up to date."""

    @abstractmethod
    def held(self, medium: str) -> set[int]:
        """Return the engine's hashes of the blocks that the index places on ``medium``."""

    @abstractmethod
    def matched(self, tokens: Sequence[int], salt: str = "") -> int:
        """Return how many blocks at the start of a prompt the engine holds, by the index."""

    def chunks(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return the whole blocks of ``tokens``."""
        starts = range(0, len(tokens) - self.block + 1, self.block)
        return [list(tokens[start : start + self.block]) for start in starts]
