"""The hashes of a prompt's beginnings, by which two prompts are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_HASHES = 512
"""Hashes kept of one prompt: 4 KB."""

HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """A prompt as hashes, each of everything up to some point: of its tokens, or of all that its
    blocks depend on, such as tokens and scopes.

    Attributes:
        step: tokens from one point to the next, such as 16.
        hashes: for each point, the hash of all that is before it, 8 bytes long.
    """

    step: int
    hashes: bytes

    def shared_tokens(self, other: "PrefixHashes", at_least: int = 0) -> int:
        """Return how many leading tokens the two have in common, rounded down to a point of both.

        Hashes made under different keys, or of prompts cut into different blocks, have nothing in
        common.

        Args:
            other: the other prompt's hashes.
            at_least: a number of tokens of interest, such as 4,096. Where fewer are in common, 0
                may be returned, which takes less time than to find out how many.
        """
        step = max(self.step, other.step)
        if step % min(self.step, other.step):
            return 0
        # A point's hash is that of all tokens before it: where two are equal, all before are.
        low, high = at_least // step, min(self.tokens, other.tokens) // step
        if low > high or (low and self._at(low * step) != other._at(low * step)):
            return 0
        # Of two turns of a conversation the later one has all of the earlier one, as a rule.
        if self._at(high * step) == other._at(high * step):
            return high * step
        high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._at(middle * step) == other._at(middle * step):
                low = middle
            else:
                high = middle - 1
        return low * step

    @property
    def tokens(self) -> int:
        """Number of tokens up to its last point."""
        return len(self.hashes) // HASH_BYTES * self.step

    def _at(self, token: int) -> bytes:
        end = token // self.step * HASH_BYTES
        return self.hashes[end - HASH_BYTES : end]


def step_for(tokens: int, block_tokens: int) -> int:
    """Return how many tokens to put between two points: a block's, or those of several blocks where
    a prompt of ``tokens`` tokens has more than `MAX_HASHES`."""
    step = block_tokens
    while tokens // step > MAX_HASHES:
        step *= 2
    return step


def hashes_of_blocks(hashes: Sequence[bytes], block_tokens: int) -> PrefixHashes:
    """Return the hashes of a prompt's blocks, each of which depends on the one before.

    Args:
        hashes: of the whole blocks of the prompt.
        block_tokens: tokens per block.
    """
    step = step_for(len(hashes) * block_tokens, block_tokens)
    stride = step // block_tokens
    return PrefixHashes(step, b"".join(key[:HASH_BYTES] for key in hashes[stride - 1 :: stride]))
