"""A row of the table: a router in front of replicas of some kind, and what was measured."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.fleet.drive import Outcome
from benchmarks.fleet.engine import KINDS, Engine, FrontEnd, Tiers
from benchmarks.fleet.router import ROUTERS, Policy, Router

ONE_REPLICA = Router("one big replica", FrontEnd.PYTHON, Policy.SESSION)
"""What a fleet is compared with: one engine with the memory of all."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row before it is measured.

    Attributes:
        router: the router.
        engine: the kind of replica behind it.
        replays: whether each call goes to the replica that the router chose for plain vLLM,
            instead of one that it chooses anew.
    """

    router: Router
    engine: Engine
    replays: bool = False

    @property
    def name(self) -> str:
        """What ``--only`` looks for."""
        router = self.router
        if router is ONE_REPLICA:
            return f"{router.name} / {self.engine.name}"
        return f"{router.name}, {self.engine.front_end} / {self.chooses} / {self.engine.name}"

    @property
    def chooses(self) -> str:
        """How a replica is chosen, in words."""
        return f"{self.router.policy}{', as for plain' if self.replays else ''}"

    @property
    def replicas(self) -> int:
        """How many replicas there are."""
        return 1 if self.router is ONE_REPLICA else 2

    @property
    def missing(self) -> list[str]:
        """What it needs and is not installed."""
        return [program.name for program in self.router.needs if not program.is_installed]


@dataclass(frozen=True, slots=True)
class Measured:
    """A row with what was measured.

    Attributes:
        row: the row.
        outcome: what became of the load.
        first_time: tokens that any cache has to compute.
        asked_of_redis: chunks by operation and outcome, as in ``cachescope_tier_keys_total``; empty
            where a replica has no such metric on its port.
        split: calls that each replica answered; empty where their ports do not tell.
        redis_bytes: by how much Redis's memory grew, in bytes; None without Redis.
        own: tokens that a tenant read of its own; None where that was not looked at.
        across: tokens that a tenant read of another one's.
    """

    row: Row
    outcome: Outcome
    first_time: int
    asked_of_redis: dict[str, int]
    split: tuple[int, ...]
    redis_bytes: int | None
    own: int | None
    across: int | None

    @property
    def computed(self) -> int:
        """Tokens that were computed."""
        return self.outcome.prompts - self.outcome.read

    @property
    def twice(self) -> int:
        """Tokens that were computed though some replica had computed them before."""
        return self.computed - self.first_time

    @property
    def share(self) -> float:
        """Tokens read, of those in prompts."""
        return self.outcome.read / self.outcome.prompts

    @property
    def p50_ms(self) -> float:
        """Median time to the first token, in milliseconds."""
        return 1000 * statistics.median(self.outcome.ttft_s)

    @property
    def p99_ms(self) -> float:
        """99th percentile of the time to the first token, in milliseconds."""
        return 1000 * statistics.quantiles(self.outcome.ttft_s, n=100, method="inclusive")[98]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            **{"row": self.row.name, "router": self.row.router.name},
            **{"policy": self.row.router.policy, "replicas": self.row.replicas},
            **{"front_end": self.row.engine.front_end, "engine": self.row.engine.name},
            **{"read": self.outcome.read, "prompts": self.outcome.prompts, "twice": self.twice},
            **{"share": self.share, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms},
            **{"split": self.split},
            **{"asked_of_redis": self.asked_of_redis, "redis_bytes": self.redis_bytes},
            **{"seconds": self.outcome.seconds, "own": self.own, "across": self.across},
        }


def all_rows() -> list[Row]:
    """Return all rows, those of one kind of replica one after the other."""
    rows = [Row(ONE_REPLICA, Engine(FrontEnd.PYTHON, plugin, tiers)) for plugin, tiers in KINDS]
    for front_end in FrontEnd:
        for plugin, tiers in KINDS:
            engine = Engine(front_end, plugin, tiers)
            routers = [router for router in ROUTERS if router.front_end is front_end]
            rows += [Row(router, engine) for router in routers]
            if engine.plugin and tiers is Tiers.DEVICE:
                rows += [Row(router, engine, replays=True) for router in routers if router.tells]
    return rows


_QUICK = (
    "one big replica / CacheScope, + Redis",
    "the client, Python / random / plain vLLM",
    "SMG, Python / by prefix / plain vLLM",
    "SMG, Python / by prefix, as for plain / CacheScope, device only",
    "the client, Python / random / CacheScope, + Redis",
    "SMG, Python / by prefix / CacheScope, + Redis",
)


def quick_rows() -> list[Row]:
    """Return the rows that show most in least time."""
    return [row for row in all_rows() if row.name in _QUICK]
