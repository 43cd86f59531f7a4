"""The policies that can be simulated, by name."""

from collections.abc import Callable, Sequence

from vllm_cachescope.simulation.belady import Belady
from vllm_cachescope.simulation.peers.arc import Arc
from vllm_cachescope.simulation.peers.base import Peer
from vllm_cachescope.simulation.peers.gdsf import Gdsf
from vllm_cachescope.simulation.peers.lhd import Lhd
from vllm_cachescope.simulation.peers.recency import Lru, LruTtl
from vllm_cachescope.simulation.peers.s3_fifo import S3Fifo
from vllm_cachescope.simulation.peers.tiny_lfu import WTinyLfu
from vllm_cachescope.simulation.simulated_cache import (
    LearnedCache,
    LifetimeCache,
    PeerCache,
    SimulatedCache,
)
from vllm_cachescope.simulation.traced_request import TracedRequest

PEERS: dict[str, Callable[[int], Peer]] = {
    "lru": Lru,
    "lru+ttl": LruTtl,
    "arc": Arc,
    "s3-fifo": S3Fifo,
    "w-tinylfu": WTinyLfu,
    "gdsf": Gdsf,
    "lhd": Lhd,
}

POLICIES = ("learned", "lifetime", *PEERS, "belady")
"""All names: the CPU tier's own two, the peers, and the offline optimum."""


def make_cache(
    policy: str, capacity: int, requests: Sequence[TracedRequest], long_share: float
) -> SimulatedCache:
    """Return an empty cache that runs one of `POLICIES`.

    Args:
        policy: the policy's name.
        capacity: how many blocks the cache holds.
        requests: what will be replayed; only the optimum looks at it.
        long_share: the share that ``learned`` keeps for what is marked to live longer.
    """
    if policy == "learned":
        return LearnedCache(capacity, long_share)
    if policy == "lifetime":
        return LifetimeCache(capacity)
    if policy == "belady":
        return Belady(capacity, requests)
    return PeerCache(PEERS[policy](capacity))
