"""Marked conversations: a share of a trace's conversations, drawn at random, asks for longer."""

import random
from collections.abc import Sequence
from dataclasses import replace

from vllm_cachescope.simulation.traced_request import TracedRequest

SHORT_TTL_S, LONG_TTL_S = 300, 3600


def mark_conversations(
    requests: Sequence[TracedRequest], share: float, rng: random.Random
) -> list[TracedRequest]:
    """Return the requests with a TTL: an hour for a share of the conversations, and five minutes
    for the others.

    A request goes on with a conversation if what it shares with earlier requests ends where the
    prompt of one of them did; that prompt's last block may have been partial.

    Args:
        requests: the requests, in order of time.
        share: which share of the conversations is marked, from 0 to 1.
        rng: draws them.
    """
    is_long_at: dict[bytes, bool] = {}
    seen: set[bytes] = set()
    marked: list[TracedRequest] = []
    for request in requests:
        last = next((key for key in reversed(request.keys) if key in seen), None)
        is_long = is_long_at.get(last) if last is not None else None
        if is_long is None:
            is_long = rng.random() < share
        is_long_at |= {key: is_long for key in request.keys[-2:] if key not in seen}
        seen.update(request.keys)
        ttl_s = LONG_TTL_S if is_long else SHORT_TTL_S
        marked.append(replace(request, ttl_s=ttl_s))
    return marked
