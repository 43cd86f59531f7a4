"""The settings of the tiers behind the CPU tier, each in a store that engines may share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, field_validator

from vllm_cachescope.config.secret import secret_text
from vllm_cachescope.config.values import Model, TierName, Wait


class _Tier(Model):
    """The keys that tiers of every type have.

    Attributes:
        name: the tier's name in reports and metrics.
        load_deadline: seconds that one request may wait for the tier's blocks. The engine then
            computes the blocks that have not come.
        load_share: fraction of the time that computing the blocks would take, for which a request
            may wait where that is longer than `load_deadline`, as long as blocks keep coming; 0
            for never.
        timeout: seconds that anything else may take: connecting, storing, a health check.
        max_inflight_bytes: bytes of blocks queued or under way, in each direction; further blocks
            are dropped. A block that waits to be stored cannot leave the CPU tier.
        connections: connections (and threads) that read.
        failures: failures in a row after which the tier is left alone.
        first_probe: seconds until a tier that is left alone is tried again; doubled each time.
        longest_probe: longest time between two tries, in seconds.
        encrypt: whether the blocks are encrypted in the store.
    """

    name: TierName
    load_deadline: Wait = 0.25
    load_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    timeout: Wait = 1.0
    max_inflight_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**28)
    connections: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    failures: Annotated[int, Field(strict=True, ge=1)] = 2
    first_probe: Wait = 0.5
    longest_probe: Wait = 15.0
    encrypt: Annotated[bool, Field(strict=True)] = False


class RedisTier(_Tier):
    """A tier in Redis or Valkey.

    Attributes:
        url: the address: ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://``,
            ``redis+cluster://`` and the last two with ``rediss``.
        password_file: file the password is read from; without one, the environment counts.
    """

    type: Literal["redis"]
    name: TierName = "redis"
    url: Annotated[SecretStr, Field(min_length=1)]
    password_file: Path | None = None

    def password(self) -> str | None:
        """Return the password from its file or the environment (``CACHESCOPE_REDIS_PASSWORD`` for
        the tier ``redis``); None if it is in neither.

        Raises:
            ConfigError: if the file cannot be read, or is empty.
        """
        variable = f"CACHESCOPE_{self.name.upper()}_PASSWORD"
        return secret_text(None, self.password_file, "password", variable, shortest=1)


class LMCacheTier(_Tier):
    """A tier over one of LMCache's L2 adapters.

    Attributes:
        adapter: the adapter's own configuration: ``type``, and the keys of that type.
    """

    type: Literal["lmcache"]
    name: TierName = "lmcache"
    adapter: Annotated[dict[str, Any], Field(repr=False)]

    @field_validator("adapter")
    @classmethod
    def _has_a_type(cls, adapter: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(adapter.get("type"), str):
            raise ValueError(
                "it needs a type, that of one of LMCache's L2 adapters, such as fs, resp or s3"
            )
        return adapter


class DiskTier(_Tier):
    """A tier in a directory of this machine.

    Attributes:
        path: the directory; made if it is not there. All engines that use it set the same values
            below.
        capacity: bytes that its files may take up.
        keep_free: bytes that are left free on its file system, whoever takes them up.
    """

    type: Literal["disk"]
    name: TierName = "disk"
    path: Path
    capacity: Annotated[ByteSize, Field(gt=0)]
    keep_free: Annotated[ByteSize, Field(ge=0)] = ByteSize(2**30)

    @field_validator("path")
    @classmethod
    def _is_absolute(cls, path: Path) -> Path:
        if not path.is_absolute():
            raise ValueError(f"{path} depends on where the server is started; name it from / on")
        return path


Tier = RedisTier | LMCacheTier | DiskTier
TIERS: dict[str, type[_Tier]] = {"disk": DiskTier, "lmcache": LMCacheTier, "redis": RedisTier}
"""The models of tiers by their ``type``."""


def _has_a_known_type(value: object) -> object:
    # Before pydantic looks: its message for a wrong discriminator shows the tier, passwords too.
    if isinstance(value, dict) and value.get("type") not in TIERS:
        allowed = ", ".join(TIERS)
        raise ValueError(f"type: {value.get('type')!r} is no type of tier; allowed: {allowed}")
    return value


AnyTier = Annotated[Tier, Field(discriminator="type"), BeforeValidator(_has_a_known_type)]
"""A tier of any type, told apart by its ``type``."""
