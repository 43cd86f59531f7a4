"""The access to a running server from the command line: its address, and the token to present."""

import argparse
from pathlib import Path

from vllm_cachescope.config import ConfigError
from vllm_cachescope.config.secret import OPERATOR_VARIABLE, secret_text

DEFAULT_URL = "http://localhost:8000"


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names the token; `read_token` reads it."""
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with the operator token, or with the organisation's own API key (default: the "
        f"variable {OPERATOR_VARIABLE})",
    )
    # Not an abbreviation of the other one: others would see the token in the list of processes.
    parser.add_argument("--token", help=argparse.SUPPRESS)


def read_token(arguments: argparse.Namespace) -> str | None:
    """Return the token; None if none is named.

    Raises:
        ConfigError: if it stands on the command line, or its file cannot be read.
    """
    if arguments.token is not None:
        raise ConfigError(
            "--token: a token may not stand on a command line, which others can read; allowed: "
            f"--token-file, or the variable {OPERATOR_VARIABLE}"
        )
    try:
        return secret_text(None, arguments.token_file, "token", OPERATOR_VARIABLE, shortest=1)
    except ConfigError as error:
        raise ConfigError(f"--{error.args[0].replace('token_file', 'token-file', 1)}") from None
