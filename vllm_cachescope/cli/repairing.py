"""What a server's repairs would have saved on recorded traffic, by kind."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_cachescope import wire
from vllm_cachescope.cli.explaining import explain
from vllm_cachescope.cli.explanation import Explanation
from vllm_cachescope.cli.shared_prefixes import SharedPrefixes
from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.config import Config, ConfigError, load
from vllm_cachescope.config.repair import RepairChoice, RepairSettings
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.repair.repair import RepairKind
from vllm_cachescope.repair.repairer import Repairer
from vllm_cachescope.tenancy.scope import Caller

ALL = "all"
"""The name of all kinds together."""

_TTLS = Config().allowed_ttls
_DEFAULT = RepairChoice(tools_order=True, json_form=True, latched_field=True)


@dataclass(slots=True)
class Saving:
    """What repairs would have saved.

    Attributes:
        kind: the kind, or `ALL`.
        requests: how many requests would have been repaired.
        tokens: tokens that would have been read more.
    """

    kind: str
    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class RepairTrial:
    """Recorded traffic with and without repairs.

    Attributes:
        savings: by each kind alone, then by all together.
        requests: how many requests there are.
        unnamed: how many of them name no session, and so are never repaired.
        bodiless: how many were recorded without the body that was sent.
        prompt_tokens: tokens of all prompts.
        reusable: how many of them are reusable without any repair.
    """

    savings: list[Saving] = field(default_factory=list)
    requests: int = 0
    unnamed: int = 0
    bodiless: int = 0
    prompt_tokens: int = 0
    reusable: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            "requests": self.requests,
            "without_session": self.unnamed,
            "without_body": self.bodiless,
            "prompt_tokens": self.prompt_tokens,
            "reusable_tokens": self.reusable,
            "kinds": {
                one.kind: {"requests": one.requests, "saved_tokens": one.tokens}
                for one in self.savings
            },
        }


def add_arguments(group: "argparse._ArgumentGroup") -> None:
    """Add the options of a trial."""
    group.add_argument(
        "--repair",
        action="store_true",
        help="say what a server's repairs would have saved, each kind alone and all together",
    )
    group.add_argument(
        "--repair-config",
        type=Path,
        metavar="FILE",
        help="try what `repair` says in this configuration, patterns included (default: "
        "tools_order, json_form and latched_field)",
    )


def chosen(args: argparse.Namespace) -> RepairChoice | None:
    """Return what is to be tried; None for nothing.

    Raises:
        ConfigError: if the configuration cannot be used, or puts nothing right.
    """
    if args.repair_config is None:
        return _DEFAULT if args.repair else None
    settings = load({"config_file": args.repair_config}).repair
    if not settings.is_on:
        raise ConfigError(
            f"{args.repair_config}: `repair` puts nothing right for organisations that it does not "
            "name"
        )
    return settings


def try_repairs(
    calls: Iterable[Call],
    choice: RepairChoice,
    ttl_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
) -> RepairTrial:
    """Return what repairs would have saved.

    Args:
        calls: the calls, in order of time.
        choice: what is put right.
        ttl_s: see `explain`.
        prefixes: how tokens are counted; what it holds is not used.
    """
    calls = [replace(call, usage=None) for call in calls]
    count = None if prefixes is None else prefixes.count

    def explained(calls: Iterable[Call]) -> Explanation:
        fresh = SharedPrefixes(ttl_s) if count is None else SharedPrefixes(ttl_s, count)
        return Explanation(list(explain(calls, ttl_s, fresh, text=False)))

    before = explained(calls)
    trial = RepairTrial(
        requests=len(calls),
        unnamed=sum(call.session is None for call in calls),
        bodiless=sum(call.body is None for call in calls),
        prompt_tokens=before.prompt_tokens,
        reusable=before.reusable_tokens,
    )
    for kind, of_kind in {**_each(choice), ALL: choice}.items():
        saving = Saving(kind)
        mended = list(_mended(calls, of_kind, saving))
        if saving.requests:
            saving.tokens = explained(mended).reusable_tokens - trial.reusable
        trial.savings.append(saving)
    return trial


def _each(choice: RepairChoice) -> dict[str, RepairChoice]:
    """Return what of ``choice`` is on, kind by kind."""
    kinds = {
        RepairKind.TOOLS: RepairChoice(tools_order=choice.tools_order),
        RepairKind.JSON: RepairChoice(json_form=choice.json_form),
        RepairKind.FIELD: RepairChoice(
            latched_field=choice.latched_field, latched_params=choice.latched_params
        ),
        RepairKind.HEAD: RepairChoice(volatile_head=choice.volatile_head),
    }
    return {kind.value: of_kind for kind, of_kind in kinds.items() if of_kind.is_on}


def _mended(calls: Iterable[Call], choice: RepairChoice, saving: Saving) -> Iterable[Call]:
    now = 0.0
    names = RepairChoice.model_fields
    settings = RepairSettings(**{name: getattr(choice, name) for name in names})
    repairer = Repairer(settings, {}, lambda: now)
    for call in calls:
        now = max(now, call.at or now)
        caller, protocol = Caller("traffic", call.session), call.request.protocol
        if call.body is None or not repairer.is_on(caller, protocol):
            yield call
            continue
        mended = repairer.mend(caller, protocol, _plain(call.body))
        repairer.learn(mended.lessons)
        if not mended.repairs:
            yield call
            continue
        saving.requests += 1
        try:
            yield replace(call, request=wire.READERS[protocol](mended.fields, _TTLS))
        except BadRequest:  # It would have been served as it came.
            yield call


def _plain(body: Mapping[str, Any]) -> dict[str, Any]:
    return body if isinstance(body, dict) else dict(body)


def render(trial: RepairTrial, console: Console) -> None:
    """Print a trial for people."""
    table = Table(title="What repairs would have saved", title_justify="left")
    table.add_column("repair")
    table.add_column("requests", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("of all", justify="right")
    for one in trial.savings:
        share = f"{one.tokens / trial.prompt_tokens:.1%}" if trial.prompt_tokens else "none"
        table.add_row(one.kind, f"{one.requests:,}", f"{one.tokens:,}", share)
    console.print(table)
    if trial.unnamed:
        console.print(
            f"{trial.unnamed:,} of {trial.requests:,} requests name no session: they are never "
            "repaired.",
            soft_wrap=True,
        )
    if trial.bodiless:
        console.print(
            f"{trial.bodiless:,} of {trial.requests:,} requests were recorded without a body.",
            soft_wrap=True,
        )
