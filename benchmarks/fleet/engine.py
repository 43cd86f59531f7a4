"""An engine's kind: which front end it has, whether the plugin is in it, and which tiers."""

from dataclasses import dataclass
from enum import StrEnum


class FrontEnd(StrEnum):
    """What stands in front of a replica's engine."""

    PYTHON = "Python"
    GRPC = "gRPC"
    RUST = "Rust"
    DYNAMO = "Dynamo"


class Tiers(StrEnum):
    """What stands behind a replica's device."""

    DEVICE = "device only"
    CPU = "+ CPU"
    REDIS = "+ Redis"


@dataclass(frozen=True, slots=True)
class Engine:
    """A kind of replica.

    Attributes:
        front_end: what takes its requests.
        plugin: whether it has CacheScope; plain vLLM otherwise.
        tiers: what stands behind its device. Plain vLLM has nothing there: its own tiers in memory
            run on no CPU platform.
    """

    front_end: FrontEnd
    plugin: bool
    tiers: Tiers

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"CacheScope, {self.tiers}" if self.plugin else "plain vLLM"


KINDS = (
    (False, Tiers.DEVICE),
    (True, Tiers.DEVICE),
    (True, Tiers.CPU),
    (True, Tiers.REDIS),
)
"""With and without the plugin, and the tiers."""
