"""The one configuration model, read by the engine, by the API side and by the command line."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_cachescope.durations import format_duration, parse_duration, parse_wait
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.caller import organisations
from vllm_cachescope.tenancy.scope import Scope

CONNECTOR = "CacheScopeConnector"
"""What vLLM's ``--kv-transfer-config`` calls the connector."""

SECRET_VARIABLE = "CACHESCOPE_SECRET"
"""Environment variable the secret is taken from where the configuration names none."""


MADE_UP = "made-up-"
"""Starts a secret that no operator chose; it differs from server to server."""


class ConfigError(ValueError):
    """The configuration is no good; the message names the key, the value and what is allowed."""

    def __str__(self) -> str:
        # It may stand alone in the log of a server that has many settings.
        return f"CacheScope configuration: {self.args[0]}"


def _duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _wait(value: object) -> object:
    return parse_wait(value) if isinstance(value, str) else value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return value


def _scope(value: object) -> object:
    if isinstance(value, str):
        try:
            return Scope.parse(value)
        except KeyError:
            names = ", ".join(scope.label for scope in Scope)
            raise ValueError(f"{value!r} is not a scope; allowed: {names}") from None
    return value


Duration = Annotated[int, BeforeValidator(_duration), Field(strict=True, gt=0)]
"""Seconds; written as ``"5m"`` or as a whole number of seconds."""

Wait = Annotated[float, BeforeValidator(_wait), Field(gt=0, allow_inf_nan=False)]
"""Seconds, also parts of one; written as ``"250ms"``, ``"5s"`` or as a number of seconds."""

ScopeName = Annotated[Scope, BeforeValidator(_scope)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RegionDefault(_Model):
    """What a region of the prompt gets where the client does not say.

    Attributes:
        scope: how widely it is shared.
        ttl: its lifetime.
    """

    scope: ScopeName = Scope.ORG
    ttl: Duration = 300


class Regions(_Model):
    """The defaults of the three regions."""

    tools: RegionDefault = RegionDefault()
    system: RegionDefault = RegionDefault()
    messages: RegionDefault = RegionDefault()

    @model_validator(mode="after")
    def _narrows(self) -> Self:
        scopes = [self.tools.scope, self.system.scope, self.messages.scope]
        if scopes != sorted(scopes):
            raise ValueError(
                "default scopes may only narrow from tools to system to messages, not "
                + ", ".join(scope.label for scope in scopes)
            )
        return self

    def of(self, region: Region) -> RegionDefault:
        """Return the defaults of ``region``."""
        return (self.tools, self.system, self.messages)[region]


class DiffSettings(_Model):
    """Diffs of the tools and system blocks that broke a prefix.

    Attributes:
        directory: where they are written, readable to nobody but the server. It is made if it is
            not there.
        max_bytes: how much it may hold; the oldest files go first.
        max_files: how many files it may hold.
        redact: regular expressions of what is left out of them, besides what looks like a key, a
            token, a password or an e-mail address.
    """

    directory: Path
    max_bytes: Annotated[ByteSize, Field(ge=2**12)] = ByteSize(2**24)
    max_files: Annotated[int, Field(strict=True, gt=0)] = 1000
    redact: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ()


class _Tier(_Model):
    """A tier behind the CPU tier, shared by all engines that name the same store.

    Attributes:
        name: what reports and metrics call it.
        load_deadline: how long one request may wait for it before it computes what has not come.
        load_share: the share of the time that computing would take for which it may wait instead,
            where that is longer, as long as blocks keep coming; 0 for never.
        timeout: how long anything else may take: connecting, storing, a health check.
        max_inflight_bytes: blocks queued or under way, in each direction; further ones are
            dropped. Blocks that wait to be stored cannot leave the CPU tier.
        connections: how many it reads with.
        failures: failures in a row after which it is left alone.
        first_probe: time until it is asked again then; doubled for each further time.
        longest_probe: longest time between two times.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    load_deadline: Wait = 0.25
    load_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    timeout: Wait = 1.0
    max_inflight_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**28)
    connections: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    failures: Annotated[int, Field(strict=True, ge=1)] = 2
    first_probe: Wait = 0.5
    longest_probe: Wait = 15.0


class RedisTier(_Tier):
    """A tier in Redis or Valkey.

    Attributes:
        url: where it is; ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://``,
            ``redis+cluster://`` and the last two with ``rediss``.
    """

    type: Literal["redis"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] = "redis"
    url: Annotated[SecretStr, Field(min_length=1)]


class LMCacheTier(_Tier):
    """A tier over one of LMCache's L2 adapters.

    Attributes:
        adapter: the adapter's own configuration: ``type``, and what that type needs.
    """

    type: Literal["lmcache"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")] = "lmcache"
    adapter: Annotated[dict[str, Any], Field(repr=False)]

    @field_validator("adapter")
    @classmethod
    def _has_a_type(cls, adapter: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(adapter.get("type"), str):
            raise ValueError(
                "it needs a type, that of one of LMCache's L2 adapters, such as fs, resp or s3"
            )
        return adapter


Tier = RedisTier | LMCacheTier
TIERS: dict[str, type[_Tier]] = {"lmcache": LMCacheTier, "redis": RedisTier}
"""What a tier is configured with, by its type."""


def _tier_type(value: object) -> object:
    # Said here, since what is said of a wrong discriminator shows the whole tier, passwords too.
    if isinstance(value, dict) and value.get("type") not in TIERS:
        allowed = ", ".join(TIERS)
        raise ValueError(f"type: {value.get('type')!r} is no type of tier; allowed: {allowed}")
    return value


class Share(_Model):
    """How much of a tier an organisation may have.

    Attributes:
        quota: bytes it may hold; over that, its own oldest entries go. None for no limit.
        reserve: bytes that others' entries do not push out.
    """

    quota: Annotated[ByteSize, Field(ge=0)] | None = None
    reserve: Annotated[ByteSize, Field(ge=0)] | None = None


class TierQuotas(Share):
    """The shares of a tier: its own attributes are those of every organisation that `orgs` does
    not name, or gives no other.

    Attributes:
        orgs: shares of single organisations: by a name in `Config.tenants`, a gateway's name, or
            an id as ``GET /cachescope/breaks`` shows it; ``global`` for what everyone shares.
        capacity: bytes of all organisations together, for a tier that does not know its own.
    """

    orgs: dict[str, Share] = {}
    capacity: Annotated[ByteSize, Field(gt=0)] | None = None

    def of(self, org: str | None) -> Share:
        """Return the share of the organisation that `orgs` calls ``org``; None for the others'."""
        own = self.orgs.get(org, Share()) if org is not None else Share()
        return Share(
            quota=self.quota if own.quota is None else own.quota,
            reserve=self.reserve if own.reserve is None else own.reserve,
        )


class Config(_Model):
    """How CacheScope runs.

    Attributes:
        cpu_bytes: size of the CPU tier, over all workers of one engine; ``"4GiB"`` or bytes.
        chunk_tokens: tokens per chunk of the CPU tier, a multiple of the device's block; None
            for one block.
        secret: key of the scope keys and of every hash kept; None for one made up at start,
            which lasts as long as the server.
        secret_file: file the secret is read from, instead of `secret`.
        ttls: the lifetimes clients may ask for. ``5m`` and ``1h`` are always among them.
        regions: scope and lifetime where the client does not say.
        tenants: names of organisations by the SHA-256 of their API key, in hex.
        tenants_file: YAML or JSON file with the same mapping.
        org_header: header in which a trusted gateway names the organisation; None to trust none.
        operator_token: bearer token that lets its holder see and manage every organisation's
            entries at the server's ``/cachescope`` paths; None for nobody.
        sweep_interval: how often an idle engine drops expired blocks.
        diffs: diffs of what broke a prefix, for the operator; None to keep no prompt text.
        tiers: stores behind the CPU tier, asked in this order.
        quotas: what organisations may hold, by the name of a tier.
    """

    cpu_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**30)
    chunk_tokens: Annotated[int, Field(strict=True, gt=0)] | None = None
    secret: Annotated[SecretStr, Field(min_length=16)] | None = None
    secret_file: Path | None = None
    ttls: tuple[Duration, ...] = (300, 1800, 3600, 43200, 86400)
    regions: Regions = Regions()
    tenants: dict[str, str] = {}
    tenants_file: Path | None = None
    org_header: Annotated[str, Field(min_length=1)] | None = None
    operator_token: Annotated[SecretStr, Field(min_length=16)] | None = None
    sweep_interval: Duration = 5
    diffs: DiffSettings | None = None
    tiers: tuple[
        Annotated[Tier, Field(discriminator="type"), BeforeValidator(_tier_type)], ...
    ] = ()

    quotas: dict[str, TierQuotas] = {}

    @model_validator(mode="after")
    def _quotas_can_be_kept(self) -> Self:
        names = ["device", "cpu", *(tier.name for tier in self.tiers)]
        for tier, quotas in self.quotas.items():
            where = f"quotas.{tier}"
            if tier not in names:
                raise ValueError(f"{where}: there is no such tier; allowed: {', '.join(names)}")
            if tier in ("device", "cpu") and quotas.capacity is not None:
                raise ValueError(f"{where}.capacity: this tier knows its own; leave it out")
            capacity = self.cpu_bytes if tier == "cpu" else quotas.capacity
            reserved = 0
            for org in (None, *quotas.orgs):
                share, at = quotas.of(org), where if org is None else f"{where}.orgs.{org}"
                if not share.reserve:
                    continue
                reserved += share.reserve * (org is not None)
                if share.quota is not None and share.reserve > share.quota:
                    raise ValueError(f"{at}: its reserve is more than its quota")
                if capacity is None and tier != "device":
                    raise ValueError(f"{at}: a reserve of this tier needs {where}.capacity")
                if capacity is not None and max(share.reserve, reserved) > capacity:
                    raise ValueError(f"{at}: more is reserved than the tier can hold")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("set secret or secret_file, not both")
        names = ["device", "cpu", *(tier.name for tier in self.tiers)]
        if len(set(names)) < len(names):
            raise ValueError(f"tiers: two tiers have one name: {', '.join(names)}")
        for digest in self.tenants:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(
                    f"tenants: {digest!r} is not the SHA-256 of an API key: write 64 lower-case "
                    "hex digits"
                )
        for name in ("tools", "system", "messages"):
            ttl = getattr(self.regions, name).ttl
            if ttl not in self.allowed_ttls:
                allowed = ", ".join(map(format_duration, self.allowed_ttls))
                raise ValueError(
                    f"regions.{name}.ttl: {format_duration(ttl)} is not among ttls; "
                    f"allowed: {allowed}"
                )
        return self

    @property
    def allowed_ttls(self) -> tuple[int, ...]:
        """The lifetimes clients may ask for, in seconds, ascending."""
        return tuple(sorted({300, 3600, *self.ttls}))

    def secret_bytes(self) -> bytes:
        """Return the secret from the configuration, its file or the environment.

        Raises:
            ConfigError: if it is nowhere, or its file cannot be read.
        """
        if self.secret is not None:
            return self.secret.get_secret_value().encode()
        if self.secret_file is not None:
            secret = _read(self.secret_file, "secret_file").strip()
            if len(secret) < 16:
                raise ConfigError(
                    f"secret_file: {self.secret_file} holds {len(secret)} characters; allowed: "
                    "16 or more"
                )
            return secret.encode()
        if from_environment := os.environ.get(SECRET_VARIABLE):
            return from_environment.encode()
        raise ConfigError(f"secret: there is none; set secret, secret_file or {SECRET_VARIABLE}")

    def check(self) -> None:
        """Look into what the configuration refers to: files, and the secret where one is needed.

        Raises:
            ConfigError: if something is missing or wrong there.
        """
        self.tenant_names()
        if self.secret is not None or self.secret_file is not None or self.tiers:
            secret = self.secret_bytes()
            if self.tiers and secret.startswith(MADE_UP.encode()):
                raise ConfigError(
                    "secret: there is none, and engines that share a tier must have the same; set "
                    f"secret, secret_file or {SECRET_VARIABLE}"
                )

    def quota_orgs(self, tier: str) -> dict[str, Share]:
        """Return the shares of the organisations that `quotas` names for ``tier``, by their ids.

        Raises:
            ConfigError: if a name is no organisation's.
        """
        quotas, names = self.quotas.get(tier, TierQuotas()), self.tenant_names().values()
        shares: dict[str, Share] = {}
        for name in quotas.orgs:
            if not (orgs := organisations(name, names, self.org_header)):
                raise ConfigError(
                    f"quotas.{tier}.orgs: {name!r} is no organisation; allowed: a name in tenants, "
                    "'global', or an id as GET /cachescope/breaks shows it"
                )
            shares |= dict.fromkeys(orgs, quotas.of(name))
        return shares

    def tenant_names(self) -> dict[str, str]:
        """Return the organisations' names by the SHA-256 of their API keys, file included.

        Raises:
            ConfigError: if the file cannot be read or does not hold such a mapping.
        """
        names = dict(self.tenants)
        if self.tenants_file is not None:
            loaded = _parse(self.tenants_file, "tenants_file")
            names |= load({"tenants": loaded}).tenants
        return names


def load(extra_config: Mapping[str, Any]) -> Config:
    """Read the configuration from vLLM's ``kv_connector_extra_config``.

    Its keys are those of `Config`, or the one key ``config_file`` with a YAML or JSON file that
    holds them; keys beside ``config_file`` override the file.

    Raises:
        ConfigError: on an unknown key, a wrong type or an impossible value.
    """
    values = dict(extra_config)
    if (path := values.pop("config_file", None)) is not None:
        loaded = _parse(Path(str(path)), "config_file")
        if not isinstance(loaded, dict):
            raise ConfigError(f"config_file: {path} must hold a mapping of keys to values")
        values = _merged(loaded, values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``over`` in place of its own, at every depth."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        location = detail["loc"]
        allowed = ", ".join(sorted(_keys_beside(location)))
        if location[:1] == ("tiers",):
            # pydantic puts a tier's type after its number, as if it were a key.
            location = location[:2] + location[3:]
        key = ".".join(map(str, location)) or "configuration"
        if detail["type"] == "extra_forbidden":
            lines.append(
                f"{key}: there is no such key (value {detail['input']!r}); allowed: {allowed}"
            )
        else:
            message = detail["msg"].removeprefix("Value error, ")
            value = "" if key == "configuration" else f" (value {_shown(key, detail['input'])})"
            lines.append(f"{key}: {message}{value}")
    return "; ".join(lines)


def _keys_beside(location: tuple[int | str, ...]) -> Iterable[str]:
    """Return the keys that may stand where the last one of ``location`` does."""
    model: type[BaseModel] = Config
    for name in location[:-1]:
        if location[0] == "tiers" and name in TIERS:
            model = TIERS[str(name)]
        elif name in model.model_fields and name != "tiers":
            annotation = model.model_fields[str(name)].annotation
            candidates = (annotation, *get_args(annotation))
            models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
            if not models:
                return ()
            model = models[0]
    return model.model_fields


def _shown(key: str, value: object) -> str:
    return (
        "not shown"
        if key in ("secret", "operator_token") or key.startswith("tiers.")
        else repr(value)
    )


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from None


def _parse(path: Path, key: str) -> Any:
    text = _read(path, key)
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}: {path} is not valid: {error}") from None
