"""The fingerprint of a prompt's tokens, by which the next prompt is compared."""

from collections.abc import Sequence
from hashlib import sha256
from hmac import digest

from vllm_cachescope.cache.prefix_hashes import HASH_BYTES, PrefixHashes, step_for
from vllm_cachescope.prompt.token_array import token_array


def fingerprint_tokens(tokens: Sequence[int], block_tokens: int, secret: bytes) -> PrefixHashes:
    """Return the fingerprint of a prompt, with one point for each block or for several.

    Args:
        tokens: the prompt.
        block_tokens: tokens per block of the engine.
        secret: key of the hashes.
    """
    step = step_for(len(tokens), block_tokens)
    ids = token_array(tokens)
    data = memoryview(ids).cast("B")
    width = ids.itemsize * step
    state = sha256(digest(secret, b"tokens", "sha256"))
    hashes = []
    for start in range(0, len(data) - width + 1, width):
        state.update(data[start : start + width])
        hashes.append(state.copy().digest()[:HASH_BYTES])
    return PrefixHashes(step, b"".join(hashes))
