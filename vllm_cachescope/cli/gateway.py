"""``cachescope gateway``: CacheScope's API side in front of vLLM's Rust server."""

import argparse
import json
import os
import sys

from vllm_cachescope.cli.launch import add_setting_arguments, read_settings
from vllm_cachescope.config import ConfigError
from vllm_cachescope.connectors.vllm import config_check

_PROGRAM = "vllm_cachescope.connectors.vllm.gateway"


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``gateway`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "gateway",
        help="serve marks, usage and diagnoses in front of vLLM's Rust server",
        description="Stands in front of vLLM's Rust server, which takes no API side in Python: "
        "reads the marks of Chat Completions and Completions, sends plans along, and writes usage "
        "and diagnoses into the answers. Needs the engines' secret and configuration, and their "
        "own ports (front_end.metrics_port).",
        allow_abbrev=False,
    )
    parser.add_argument("--upstream", metavar="URL", required=True, help="the Rust server")
    parser.add_argument(
        "--engine",
        metavar="URL",
        action="append",
        required=True,
        help="an engine's own port, once for each engine, by rank",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="where to listen (default: 8080)")
    add_setting_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope gateway``. Return 2 on a mistake; otherwise the gateway takes this process
    over."""
    try:
        settings = read_settings(args.cachescope, args.set)
        config_check.load_checked(settings)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", _PROGRAM, json.dumps(settings), args.host, str(args.port)]
    # In place of this process: signals and the exit status are the gateway's own.
    os.execv(command[0], [*command, args.upstream, *args.engine])
