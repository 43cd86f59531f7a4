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

    A request belongs to the conversation of the last block that it shares with an earlier one,
    unless that is a block that prompts of several conversations begin with.

    Args:
        requests: the requests, in order of time.
        share: which share of the conversations is marked, from 0 to 1.
        rng: draws them.
    """
    conversation: dict[bytes, int] = {}
    shared: set[bytes] = set()
    is_long: list[bool] = []
    marked: list[TracedRequest] = []
    for request in requests:
        known = next((key for key in reversed(request.keys) if key in conversation), None)
        if known is None or known in shared:
            number = len(is_long)
            is_long.append(rng.random() < share)
        else:
            number = conversation[known]
        for key in request.keys:
            if conversation.setdefault(key, number) != number:
                shared.add(key)
        ttl_s = LONG_TTL_S if is_long[number] else SHORT_TTL_S
        marked.append(replace(request, ttl_s=ttl_s))
    return marked
