"""The fingerprint of a prompt's tokens, by which the next prompt is compared."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from hmac import digest

MAX_HASHES = 512
"""Hashes kept of one prompt: 4 KB."""

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TokenFingerprint:
    """A prompt's tokens as keyed hashes, each of all tokens up to some point.

    Attributes:
        step: tokens from one point to the next, such as 16.
        hashes: for each point, the hash of all tokens before it, 8 bytes long.
    """

    step: int
    hashes: bytes

    def shared_tokens(self, other: "TokenFingerprint", at_least: int = 0) -> int:
        """Return how many leading tokens the two have in common, rounded down to a point of both.

        Fingerprints made under different keys, or of prompts cut into different blocks, have
        nothing in common.

        Args:
            other: the other prompt's fingerprint.
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
        return len(self.hashes) // _HASH_BYTES * self.step

    def _at(self, token: int) -> bytes:
        end = token // self.step * _HASH_BYTES
        return self.hashes[end - _HASH_BYTES : end]


def fingerprint_tokens(tokens: Sequence[int], block_tokens: int, secret: bytes) -> TokenFingerprint:
    """Return the fingerprint of a prompt, with one point for each block or for several.

    Args:
        tokens: the prompt.
        block_tokens: tokens per block of the engine.
        secret: key of the hashes.
    """
    step = block_tokens
    while len(tokens) // step > MAX_HASHES:
        step *= 2
    ids = array("I")
    # Faster than the constructor, which writes to each token to count references.
    ids.fromlist(tokens if isinstance(tokens, list) else list(tokens))
    data = memoryview(ids).cast("B")
    width = ids.itemsize * step
    state = sha256(digest(secret, b"tokens", "sha256"))
    hashes = []
    for start in range(0, len(data) - width + 1, width):
        state.update(data[start : start + width])
        hashes.append(state.copy().digest()[:_HASH_BYTES])
    return TokenFingerprint(step, b"".join(hashes))
