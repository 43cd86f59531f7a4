"""The settings of eviction from the CPU tier."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.values import Model


class EvictionSettings(Model):
    """Which chunks leave the CPU tier first.

    Attributes:
        policy: ``learned``: what is least likely to be used again soon; ``lifetime``: what has
            spent the largest share of its lifetime since its last use.
        device: what the device evicts where nothing is known to be over. ``lru``: what is unused
            for longest, as vLLM does; ``learned``: as ``policy``, at some microseconds a block.
        hierarchy: whether a block takes room on the device and in the CPU tier. ``inclusive``: what
            is computed is stored at once, and both may hold it; ``exclusive``: what the device
            holds as well leaves the CPU tier first, and what the device evicts is stored. Of
            ``learned`` alone.
        long_share: the share of the tier that is kept for what is marked to live longer than five
            minutes. Beyond it such chunks compete like all others. Of ``learned`` alone.
        prefetch_share: the share of the CPU tier that may hold, or be filled with, what remote
            tiers have of sessions that wait for a tool, before they ask; 0 for none. Of
            ``learned`` alone.
        state_file: where what was learned is kept over restarts; None for nowhere.
    """

    policy: Literal["learned", "lifetime"] = "learned"
    device: Literal["lru", "learned"] = "lru"
    hierarchy: Literal["inclusive", "exclusive"] = "inclusive"
    long_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    prefetch_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    state_file: Path | None = None

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.policy != "learned" and self.hierarchy == "exclusive":
            raise ValueError("hierarchy: exclusive needs policy: learned")
        if self.policy != "learned" and self.prefetch_share:
            raise ValueError("prefetch_share needs policy: learned")
        return self

    def check(self) -> None:
        """Check that the state file can be written.

        Raises:
            ConfigError: if its directory does not exist, or it is a directory itself.
        """
        if self.state_file is None:
            return
        if self.state_file.is_dir() or not self.state_file.parent.is_dir():
            raise ConfigError(
                f"eviction.state_file: {self.state_file} is no file in a directory that exists"
            )
