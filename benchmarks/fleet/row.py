"""A row of the table: a router in front of replicas of some kind."""

from dataclasses import dataclass

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


def all_rows() -> list[Row]:
    """Return all rows, those of one kind of replica one after the other."""
    rows = [Row(ONE_REPLICA, Engine(FrontEnd.PYTHON, plugin, tiers)) for plugin, tiers in KINDS]
    for front_end in FrontEnd:
        for plugin, tiers in KINDS:
            engine = Engine(front_end, plugin, tiers)
            routers = [router for router in ROUTERS if router.front_end is front_end]
            rows += [Row(router, engine) for router in routers]
            if tiers is Tiers.DEVICE:
                rows += [Row(router, engine, replays=True) for router in routers if router.tells]
    return rows


def table_rows() -> list[Row]:
    """Return the rows of the table: each front end with the router's best way to choose, the one
    in Python with the others as well."""
    return [row for row in all_rows() if _in_table(row)]


def _in_table(row: Row) -> bool:
    router = row.router
    if router is ONE_REPLICA or router.program is None:
        return True
    if router.front_end is FrontEnd.PYTHON:
        # At random it does what the client does.
        return router.policy is not Policy.RANDOM
    return router.policy is Policy.PREFIX


_QUICK = (
    "one big replica / CacheScope, + Redis",
    "the client, Python / random / plain vLLM",
    "SMG, Python / by prefix / plain vLLM",
    "the client, Python / random / CacheScope, + Redis",
    "SMG, Python / by prefix / CacheScope, + Redis",
)


def quick_rows() -> list[Row]:
    """Return the rows that show most in least time: three fleets are started for them."""
    return [row for row in all_rows() if row.name in _QUICK]
