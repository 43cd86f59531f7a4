"""A model of a fleet: which share of returning sessions a shared tier of some size still holds, and
what that takes of it; checked against a replay of sessions, one by one.

A session makes a request, comes back after a gap with some chance, or is over. All of its blocks
are used together. The tier drops what was unused for longest, and what its lifetime is over for.
After a request its blocks stay until the next one, or for the *patience* of the tier: the shorter
of the lifetime and of the time in which the tier fills with others. The patience follows from the
room (Che's approximation, for sessions in the place of items): requests a second, times blocks,
times the mean of gap or patience, whichever is shorter, is what the tier holds.
"""

import math
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a fleet does, and has.

    Attributes:
        sessions: sessions that begin in an hour.
        turns: requests of a session, on average.
        gap_s: median seconds between two requests of a session.
        spread: standard deviation of the logarithm of a gap.
        blocks: blocks of a session's prompt, on average over its requests.
        ttl_s: lifetime of the blocks, in seconds.
        room: blocks that the tier holds.
    """

    sessions: float = 10_000_000
    turns: float = 8.0
    gap_s: float = 60.0
    spread: float = 1.2
    blocks: float = 40.0
    ttl_s: float = 3600.0
    room: float = math.inf

    @property
    def requests(self) -> float:
        """Requests a second."""
        return self.sessions * self.turns / 3600

    @property
    def returns(self) -> float:
        """The chance that a session makes a further request."""
        return 1 - 1 / self.turns

    def by(self, seconds: float) -> float:
        """Return the chance that a gap is over after so many seconds."""
        if seconds <= 0:
            return 0.0
        return 0.5 * math.erfc(-math.log(seconds / self.gap_s) / self.spread / math.sqrt(2))

    def held(self, patience_s: float) -> float:
        """Return how many blocks are held by a tier of that patience."""
        steps = 2000
        width = patience_s / steps
        waiting = sum(1 - self.by((step + 0.5) * width) for step in range(steps)) * width
        stays = self.returns * waiting + (1 - self.returns) * patience_s
        return self.requests * self.blocks * stays

    @property
    def patience(self) -> float:
        """How long the tier keeps what is not used again, in seconds."""
        low, high = 0.0, self.ttl_s
        if self.held(high) <= self.room:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.held(middle) <= self.room else (low, middle)
        return low

    @property
    def hits(self) -> float:
        """The share of requests that find their session's blocks."""
        return self.returns * self.by(self.patience)


def simulated(fleet: Fleet, seconds: float, rng: random.Random) -> float:
    """Return the share of requests that find their session's blocks, by a replay of so many
    seconds, the first half of which is not counted."""
    tier: OrderedDict[int, float] = OrderedDict()
    most = fleet.room / fleet.blocks
    asked = found = 0
    for at, session in _requests(fleet, seconds, rng):
        while tier and (len(tier) > most or next(iter(tier.values())) <= at - fleet.ttl_s):
            tier.popitem(last=False)
        used_at = tier.pop(session, None)
        tier[session] = at
        if at > seconds / 2:
            asked += 1
            found += used_at is not None
    return found / asked


def _requests(fleet: Fleet, seconds: float, rng: random.Random) -> Iterator[tuple[float, int]]:
    begins, number = rng.expovariate(fleet.sessions / 3600), 0
    waiting: list[tuple[float, int]] = []
    while True:
        if waiting and waiting[0][0] <= begins:
            at, session = heappop(waiting)
        else:
            at, session = begins, number
            number += 1
            begins += rng.expovariate(fleet.sessions / 3600)
        if at > seconds:
            return
        yield at, session
        if rng.random() < fleet.returns:
            heappush(
                waiting, (at + rng.lognormvariate(math.log(fleet.gap_s), fleet.spread), session)
            )


def checked(scale: float) -> Iterator[tuple[float, float, float]]:
    """Yield the room of a tier as a part of what comes in an hour, and the hits there by the model
    and by a replay.

    Args:
        scale: 1 for a thousandth of the fleet; less for less.
    """
    fleet = Fleet(sessions=10_000 * scale)
    hour = fleet.sessions * fleet.blocks
    for part in (0.02, 0.05, 0.1, 0.2, 1.0):
        one = replace(fleet, room=part * hour)
        yield part, one.hits, simulated(one, 2 * 3600 + 8000, random.Random(1))


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Redis Cluster beside a fleet, and what one node of it can do.

    Attributes:
        nodes: primaries.
        node_bytes: what one holds.
        node_wire: bytes a second that one sends.
        node_commands: commands a second that one carries out.
    """

    nodes: int = 40
    node_bytes: float = 256 * 2**30
    node_wire: float = 3e9
    node_commands: float = 200_000


# By `redis_load`, for a block: found (EXISTS), loaded (PTTL, GET), stored (EXISTS, SET), renewed
# (one script), and entered in the index of owners, which one node has for all of a model.
_READ, _STORED, _ENTRY_BYTES = 3.0, 2.0, 400.0


def loads(
    fleet: Fleet, cluster: Cluster, local_bytes: float, block_bytes: float, home: float
) -> dict[str, float]:
    """Return what a fleet asks of a Cluster; loads are parts of what the Cluster can do.

    Args:
        fleet: the fleet.
        cluster: the Cluster.
        local_bytes: bytes in the CPU tiers of all replicas together.
        block_bytes: bytes of a block.
        home: how many requests come to the replica that had the session's last one, from 0 to 1.
    """
    local_hits = home * replace(fleet, room=local_bytes / block_bytes).hits
    both = replace(fleet, room=cluster.nodes * cluster.node_bytes / (block_bytes + _ENTRY_BYTES))
    read = max(0.0, both.hits - local_hits) * fleet.requests * fleet.blocks
    new = fleet.requests * fleet.blocks * 2 / (fleet.turns + 1)
    missed = (1 - max(local_hits, both.hits)) * fleet.requests * fleet.blocks
    stored = max(new, missed)
    # Whatever tier a block was read from, its life is renewed in all of them.
    renewed = max(local_hits, both.hits) * fleet.requests * fleet.blocks
    commands = _READ * read + _STORED * stored + renewed
    return {
        "hits of the CPU tiers": local_hits,
        "hits with Redis": max(local_hits, both.hits),
        "GB/s read": read * block_bytes / 1e9,
        "GB/s stored": stored * block_bytes / 1e9,
        "commands/s": commands,
        "wire": max(read, stored) * block_bytes / (cluster.nodes * cluster.node_wire),
        "commands": commands / (cluster.nodes * cluster.node_commands),
        "index node": (stored + renewed) / (5 * cluster.node_commands),
    }


def main() -> int:
    """Print what 100 replicas and 10,000,000 sessions a day ask of a Cluster."""
    day = Fleet(sessions=10_000_000 / 24)
    head = [*loads(day, Cluster(), 1e14, 2**25, 1.0)]
    print("KiB a token", "tokens a block", "at home", "nodes", *head, sep=" | ")
    for token_kib in (16, 64, 128):
        for tokens in (256, 16):
            for home, nodes in ((1.0, 40), (0.01, 40), (0.01, 400)):
                fleet = replace(day, blocks=10_240 / tokens)
                block = token_kib * 1024 * tokens
                found = loads(fleet, Cluster(nodes), 100 * 2**40, block, home)
                shown = (f"{value:,.3g}" for value in found.values())
                print(token_kib, tokens, f"{home:.0%}", nodes, *shown, sep=" | ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
