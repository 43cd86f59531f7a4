"""A replay of requests against a cache, which counts what they read."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_cachescope.simulation.simulated_cache import SimulatedCache
from vllm_cachescope.simulation.traced_request import TracedRequest


@dataclass(slots=True)
class Hits:
    """What some requests read.

    Attributes:
        requests: how many requests.
        blocks: blocks of their prompts.
        hit_blocks: how many of these were read: a block is, if all before it are.
        tokens: tokens of their prompts.
        hit_tokens: how many of these were read.
    """

    requests: int = 0
    blocks: int = 0
    hit_blocks: int = 0
    tokens: int = 0
    hit_tokens: int = 0

    @property
    def ratio(self) -> float:
        """The share of blocks that was read."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_ratio(self) -> float:
        """The share of tokens that was read."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    def add(self, blocks: int, hit_blocks: int, tokens: int, hit_tokens: int) -> None:
        """Add a request."""
        self.requests += 1
        self.blocks += blocks
        self.hit_blocks += hit_blocks
        self.tokens += tokens
        self.hit_tokens += hit_tokens


@dataclass(slots=True)
class Outcome:
    """What came of a replay.

    Attributes:
        total: what all requests read.
        by_ttl: what they read by the TTL that they asked for, in seconds.
        by_org: by organisation.
        evictions: blocks that left for want of room.
        most_blocks: the most blocks that were held at once.
        seconds: processor time that the policy took.
    """

    total: Hits = field(default_factory=Hits)
    by_ttl: dict[int | None, Hits] = field(default_factory=dict)
    by_org: dict[str, Hits] = field(default_factory=dict)
    evictions: int = 0
    most_blocks: int = 0
    seconds: float = 0.0

    @property
    def blocks_per_second(self) -> float:
        """How many blocks of prompts the policy looked up and stored in a second."""
        return self.total.blocks / self.seconds if self.seconds else 0.0


def replay(requests: Iterable[TracedRequest], cache: SimulatedCache, block_tokens: int) -> Outcome:
    """Return what requests read from a cache that is empty at first.

    Hits are counted here and not by the policy: the leading blocks of a prompt that are there when
    the request arrives. After that it stores all of its blocks. The clock is that of the requests.

    Args:
        requests: the requests, in order of time.
        cache: the cache.
        block_tokens: tokens of a block.
    """
    outcome = Outcome()
    began = time.process_time()
    for request in requests:
        cache.expire(request.at)
        hit = 0
        for key in request.keys:
            if key not in cache:
                break
            hit += 1
        counted = (
            len(request.keys),
            hit,
            request.tokens,
            min(request.tokens, hit * block_tokens),
        )
        outcome.total.add(*counted)
        outcome.by_ttl.setdefault(request.ttl_s, Hits()).add(*counted)
        outcome.by_org.setdefault(request.org, Hits()).add(*counted)
        cache.store(request)
        outcome.most_blocks = max(outcome.most_blocks, len(cache))
    outcome.seconds = time.process_time() - began
    outcome.evictions = cache.evictions
    return outcome
