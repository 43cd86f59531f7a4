"""The expiry of a block in a remote tier."""

STAGGER_S = 2.5e-7
"""How much sooner a block expires for each token that comes before its end in the prompt, in
seconds: 50 ms at 200,000 tokens."""


def expiry(used_at: float, ttl_s: int, end: int) -> float:
    """Return when a block of a prompt expires, in seconds on the clock of ``used_at``.

    All blocks of a prompt count from the same use, whenever they are stored, and the later ones
    expire a little sooner: under pressure a prefix loses its end before its beginning.

    Args:
        used_at: when a request began to use the prompt, or ended, in seconds.
        ttl_s: the block's lifetime, in seconds.
        end: where the block ends in the prompt, in tokens.
    """
    return used_at + ttl_s - end * STAGGER_S
