"""The command ``cachescope``."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

import vllm_cachescope
from vllm_cachescope.cli import check, explain, gateway, lint, purge, report, serve, usage
from vllm_cachescope.cli.simulate import command as simulate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="cachescope", description="Scoped, lifetime-bound prompt caching for vLLM."
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {vllm_cachescope.__version__}"
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in (serve, gateway, check, explain, lint, report, simulate, purge, usage):
        command.add_command(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if args.command in ("serve", "check"):
        args.vllm_arguments = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What is printed of a client's request may be half a surrogate pair.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = args.run(args)
        print(end="", flush=True)
    except BrokenPipeError:
        # Nobody reads on, as with `| head -1`. Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
