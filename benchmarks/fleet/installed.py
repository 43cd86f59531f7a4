"""Programs that the fleets need besides this package, where ``make frontends`` puts them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

_FRONT_ENDS = Path(__file__).parents[2] / ".cache" / "frontends"


@dataclass(frozen=True, slots=True)
class Program:
    """A program.

    Attributes:
        name: what it is called in the table.
        path: where it is.
    """

    name: str
    path: Path

    @property
    def is_installed(self) -> bool:
        """Whether it is there."""
        return self.path.exists()


SMG = Program("SMG", _FRONT_ENDS / "smg" / "bin" / "smg")
GRPC = Program("SMG's gRPC service", _FRONT_ENDS / "grpc" / "bin" / "python")
DYNAMO = Program("Dynamo", _FRONT_ENDS / "dynamo-vllm" / "bin" / "python")
RUST = Program("vLLM's Rust server", _FRONT_ENDS / "vllm-rs")
REDIS = Program("redis-server", Path(shutil.which("redis-server") or "redis-server"))
