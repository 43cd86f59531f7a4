"""A run: what one row's fleet made of the load, once."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fleet.drive import Outcome
from benchmarks.fleet.router import Choices


@dataclass(frozen=True, slots=True)
class Run(Outcome):
    """What became of the load, and what was found around it.

    Attributes:
        chosen: where each call went, as far as the router has said so.
        first_time: tokens that any cache has to compute.
        asked_of_redis: chunks by operation and outcome, as in ``cachescope_tier_keys_total``; empty
            where a replica has no such metric on its port.
        split: calls that each replica answered; empty where their ports do not tell.
        redis_bytes: by how much Redis's memory grew, in bytes; None without Redis.
        own: tokens that a tenant read of its own; None where that was not looked at.
        across: tokens that a tenant read of another one's.
        load_average: the machine's at the end.
    """

    first_time: int
    chosen: Choices
    asked_of_redis: dict[str, int]
    split: tuple[int, ...]
    redis_bytes: int | None
    own: int | None
    across: int | None
    load_average: float

    @property
    def share(self) -> float:
        """Tokens read, of those in prompts."""
        return self.read / self.prompts

    @property
    def twice(self) -> int:
        """Tokens that were computed though some replica had computed them before."""
        return self.prompts - self.read - self.first_time

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Run":
        """Return what `as_dict` returned, read from JSON."""
        tuples = {name: tuple(fields[name]) for name in ("ttft_s", "split")}
        return cls(**{**fields, **tuples})
