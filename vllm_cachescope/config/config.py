"""The one configuration model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from pydantic import ByteSize, Field, SecretStr, model_validator

from vllm_cachescope.config.diffs import DiffSettings
from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.config.front_end import FrontEndSettings
from vllm_cachescope.config.ledger import LedgerSettings
from vllm_cachescope.config.markers import MarkerPolicy
from vllm_cachescope.config.quotas import LOCAL_TIERS, OrgQuota, TierQuotas, check_quotas
from vllm_cachescope.config.regions import Regions
from vllm_cachescope.config.repair import RepairChoice, RepairSettings
from vllm_cachescope.config.secret import (
    MIN_SECRET,
    OPERATOR_VARIABLE,
    SECRET_VARIABLE,
    chosen_secret,
    made_up_secret,
    secret_text,
)
from vllm_cachescope.config.tenants import Tenants, read_tenants
from vllm_cachescope.config.tiers import AnyTier, DiskTier, RedisTier, Tier
from vllm_cachescope.config.values import Duration, Model, Wait
from vllm_cachescope.durations import format_duration
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.caller import UNLISTED, organisations
from vllm_cachescope.tenancy.owner_tags import EVERYONE


class Config(Model):
    """How CacheScope runs.

    Attributes:
        cpu_bytes: size of the CPU tier, over all workers of one engine; ``"4GiB"`` or bytes.
        cpu_wait: longest that a request waits for room in the CPU tier for what a remote tier
            holds, in seconds; then it computes that.
        cpu_wait_share: fraction of the time that computing the blocks, and those that other
            requests wait for before it, would take, for which a request waits at most; 0 for not
            at all.
        chunk_tokens: tokens per chunk of the CPU tier, a multiple of the device's block; None
            for one block.
        secret: key of the scope keys and of every hash kept; None for one made up at start,
            which lasts as long as the server.
        secret_file: file the secret is read from, instead of `secret`.
        ttls: the TTLs clients may ask for. ``5m`` and ``1h`` are always among them.
        regions: scope and TTL where the client does not say.
        markers: what becomes of a wrong cache marker: refused, or ignored.
        repair: what is put right in requests that would break a prefix without need; nothing by
            default.
        tenants: names of organisations by the SHA-256 of their API key, in hex.
        tenants_file: YAML or JSON file with the same mapping.
        global_writers: organisations that may share as ``global``; None for those that are listed,
            or for anyone where none are.
        org_header: header in which a trusted gateway names the organisation; None to trust none.
        front_end: what is trusted, and shown, where the front end is not our own.
        operator_token: bearer token that lets its holder see and manage every organisation's
            entries at the server's ``/cachescope`` paths; None for nobody.
        operator_token_file: file the token is read from, instead of `operator_token`.
        page: whether the server shows its page at ``/cachescope``.
        show_replicas: whether organisations see replicas by their names, as the operator does.
        token_bytes: memory for the tokens of recent prompts in each API process, from which the
            next prompt of a session goes on; 0 to keep none, and tokenise each prompt as a whole.
        sweep_interval: how often an idle engine drops expired blocks.
        diffs: diffs of what broke a prefix, for the operator; None to keep no prompt text.
        ledger: the ledger of what was used; None to keep none.
        prices: YAML or JSON file with what tokens cost, by model; None for no costs.
        tiers: tiers behind the CPU tier, looked up in this order.
        quotas: what organisations may hold, by the name of a tier.
        eviction: which chunks leave the CPU tier first.
        org_label: whether metrics tell organisations apart: False for not at all, True for those
            in tenants, or the names of those that have a label of their own; the rest is ``other``.
        self_describing_kv_events: whether KV events of the CPU tier and remote ones carry the
            blocks' tokens, as routers need them; it matters only where vLLM publishes KV events.
    """

    cpu_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**30)
    cpu_wait: Wait = 5.0
    cpu_wait_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    chunk_tokens: Annotated[int, Field(strict=True, gt=0)] | None = None
    secret: Annotated[SecretStr, Field(min_length=MIN_SECRET)] | None = None
    secret_file: Path | None = None
    ttls: tuple[Duration, ...] = (300, 1800, 3600, 43200, 86400)
    regions: Regions = Regions()
    markers: MarkerPolicy = MarkerPolicy()
    repair: RepairSettings = RepairSettings()
    tenants: Tenants = Field(default_factory=dict)
    tenants_file: Path | None = None
    global_writers: tuple[str, ...] | None = None
    org_header: Annotated[str, Field(min_length=1)] | None = None
    front_end: FrontEndSettings = FrontEndSettings()
    operator_token: Annotated[SecretStr, Field(min_length=MIN_SECRET)] | None = None
    operator_token_file: Path | None = None
    page: Annotated[bool, Field(strict=True)] = False
    show_replicas: Annotated[bool, Field(strict=True)] = False
    token_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(64 * 2**20)
    sweep_interval: Duration = 5
    diffs: DiffSettings | None = None
    ledger: LedgerSettings | None = None
    prices: Path | None = None
    tiers: tuple[AnyTier, ...] = ()
    quotas: dict[str, TierQuotas] = Field(default_factory=dict)
    eviction: EvictionSettings = EvictionSettings()
    org_label: Annotated[bool, Field(strict=True)] | tuple[str, ...] = False
    self_describing_kv_events: Annotated[bool, Field(strict=True)] = True

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("set secret or secret_file, not both")
        if self.operator_token is not None and self.operator_token_file is not None:
            raise ValueError("set operator_token or operator_token_file, not both")
        names = [*LOCAL_TIERS, *(tier.name for tier in self.tiers)]
        if len(set(names)) < len(names):
            raise ValueError(f"tiers: two tiers have one name: {', '.join(names)}")
        capacities = {"cpu": int(self.cpu_bytes)} | {
            tier.name: int(tier.capacity) for tier in self.tiers if isinstance(tier, DiskTier)
        }
        check_quotas(self.quotas, names, capacities)
        for region in Region:
            ttl_s = self.regions.of(region).ttl_s
            if ttl_s not in self.allowed_ttls:
                allowed = ", ".join(map(format_duration, self.allowed_ttls))
                raise ValueError(
                    f"regions.{region.label}.ttl: {format_duration(ttl_s)} is not among ttls; "
                    f"allowed: {allowed}"
                )
        return self

    @property
    def allowed_ttls(self) -> tuple[int, ...]:
        """The TTLs clients may ask for, in seconds, ascending."""
        return tuple(sorted({300, 3600, *self.ttls}))

    def check(self, check_store: Callable[[Tier], None]) -> None:
        """Check the files, organisations, stores and the secret that the values refer to.

        Together with `load` these are all checks that can be made before a model is loaded. The
        check connects to nothing and writes nothing.

        Args:
            check_store: raises `ConfigError` if a tier's store cannot be used; only the connector
                of that store knows.

        Raises:
            ConfigError: on the first mistake.
        """
        self.global_writer_ids()
        self.labelled_orgs()
        self.repair_of_orgs()
        for tier in self.quotas:
            self.org_quotas(tier)
        if chosen_secret(self.secret, self.secret_file) is None and self.tiers:
            raise ConfigError(
                "secret: there is none, and engines that share a tier must have the same; set "
                f"secret, secret_file or {SECRET_VARIABLE}"
            )
        self.operators_token()
        self.eviction.check()
        if self.diffs is not None:
            self.diffs.check()
        if self.ledger is not None:
            self.ledger.check()
        for settings in self.tiers:
            check_store(settings)

    def secret_bytes(self) -> bytes:
        """Return the secret from the configuration, its file or the environment.

        Raises:
            ConfigError: if there is none, or its file cannot be read.
        """
        secret = chosen_secret(self.secret, self.secret_file) or made_up_secret()
        if secret is None:
            raise ConfigError(
                f"secret: there is none; set secret, secret_file or {SECRET_VARIABLE}"
            )
        return secret

    def operators_token(self) -> bytes | None:
        """Return the operator's token from the configuration, its file or the environment; None if
        there is none.

        Raises:
            ConfigError: if its file cannot be read, or the token is too short.
        """
        token = secret_text(
            self.operator_token, self.operator_token_file, "operator_token", OPERATOR_VARIABLE
        )
        return None if token is None else token.encode()

    def secret_files(self) -> dict[str, Path]:
        """Return the files that hold nothing but a secret, by the keys that name them."""
        files = {
            "ledger.password_file": None if self.ledger is None else self.ledger.password_file,
            "secret_file": self.secret_file,
            "operator_token_file": self.operator_token_file,
            **{
                f"tier {tier.name}: password_file": tier.password_file
                for tier in self.tiers
                if isinstance(tier, RedisTier)
            },
        }
        return {key: path for key, path in files.items() if path is not None}

    def org_quotas(self, tier: str) -> dict[str, OrgQuota]:
        """Return the quotas of the organisations that `quotas` names for ``tier``, by their ids.

        Raises:
            ConfigError: if a name is no organisation's.
        """
        of_tier, names = self.quotas.get(tier, TierQuotas()), self.tenant_names().values()
        quotas: dict[str, OrgQuota] = {}
        for name in of_tier.orgs:
            orgs = [name] if name == UNLISTED else organisations(name, names, self.org_header)
            if not orgs:
                raise ConfigError(
                    f"quotas.{tier}.orgs: {name!r} is no organisation; allowed: a name in tenants, "
                    "'global', 'unlisted', or an id as GET /cachescope/breaks shows it"
                )
            quotas |= dict.fromkeys(orgs, of_tier.of(name))
        return quotas

    def repair_of_orgs(self) -> dict[str, RepairChoice]:
        """Return what is put right for the organisations that `repair` names, by their ids.

        Raises:
            ConfigError: if a name is no organisation's.
        """
        return {
            org: choice
            for name, choice in self.repair.orgs.items()
            for org in self._org_ids("repair.orgs", (name,))
        }

    def global_writer_ids(self) -> frozenset[str] | None:
        """Return the ids of the organisations that `global_writers` names; None where it is left
        out.

        Raises:
            ConfigError: if a name is no organisation's.
        """
        if self.global_writers is None:
            return None
        return self._org_ids("global_writers", self.global_writers)

    def labelled_orgs(self) -> frozenset[str] | None:
        """Return the ids of the organisations that have a label of their own in metrics; None if
        metrics do not tell organisations apart.

        Raises:
            ConfigError: if `org_label` names what is no organisation, or asks for the tenants where
                there are none.
        """
        names = self.tenant_names().values()
        if self.org_label is False:
            return None
        if self.org_label is True:
            if not names:
                raise ConfigError(
                    "org_label: true labels the organisations in tenants, and there are none; "
                    "allowed: a list of names, as behind a gateway"
                )
            return frozenset(f"name:{name}" for name in names)
        return self._org_ids("org_label", self.org_label)

    def _org_ids(self, key: str, wanted: tuple[str, ...]) -> frozenset[str]:
        """Return the ids of the organisations that a key of the configuration names.

        Raises:
            ConfigError: if one is no organisation.
        """
        names = self.tenant_names().values()
        found = {name: organisations(name, names, self.org_header) for name in wanted}
        for name, orgs in found.items():
            if not orgs or name == EVERYONE:
                raise ConfigError(
                    f"{key}: {name!r} is no organisation; allowed: a name in tenants, "
                    "'anonymous', or an id as GET /cachescope/breaks shows it"
                )
        return frozenset(org for orgs in found.values() for org in orgs)

    def tenant_names(self) -> dict[str, str]:
        """Return the organisations' names by the SHA-256 of their API keys, file included.

        Raises:
            ConfigError: if the file cannot be read or does not hold such a mapping.
        """
        if self.tenants_file is None:
            return dict(self.tenants)
        return self.tenants | read_tenants(self.tenants_file)
