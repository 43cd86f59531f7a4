"""How many examples tests draw: a part of them, or all with ``--hypothesis-profile=thorough``."""

from hypothesis import settings

THOROUGH = "thorough"

# Without a deadline: tests assert what is done, not how fast a busy machine does it.
settings.register_profile("usual", max_examples=50, deadline=None)
settings.register_profile(THOROUGH, max_examples=200, deadline=None)


def examples(count: int) -> int:
    """Return how many of ``count`` examples to draw: all of them, or usually a fifth."""
    return count if settings.get_current_profile_name() == THOROUGH else count // 5
