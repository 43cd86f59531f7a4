"""``cachescope usage``: what organisations, sessions and models used, and what that cost."""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.server_access import DEFAULT_URL, add_token_arguments, read_token
from vllm_cachescope.cli.usage_tables import phase_table, print_usage
from vllm_cachescope.config import ConfigError
from vllm_cachescope.config.ledger import FILE, PASSWORD_VARIABLE
from vllm_cachescope.config.secret import secret_text

_TIMEOUT_S = 60
_FORMATS = ("table", "csv", "json", "parquet")


class UsageError(Exception):
    """Raised for what ends the command, with a message for the user."""


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``usage`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "usage",
        help="tokens and costs by organisation, session, model and time",
        description="Shows what the ledger has: tokens uncached, created and read, what reading "
        "saved, and costs where there are prices. It asks a running server, or reads the ledger's "
        "database itself.",
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="a duration before now as in 7d, or a date or time (UTC) as in 2026-11-01 (default: "
        "1d, with --phases 90d)",
    )
    parser.add_argument("--until", metavar="WHEN", help="the same (default: now)")
    parser.add_argument(
        "--by",
        metavar="NAMES",
        default="",
        help="what to split by, separated by commas: one of hour, day, week, month; org, session, "
        "model, replica, scope, ttl",
    )
    parser.add_argument("--org", metavar="NAME", help="this organisation only")
    parser.add_argument("--session", metavar="ID", help="this session only")
    parser.add_argument("--model", metavar="NAME", help="this model only")
    parser.add_argument(
        "--phases",
        action="store_true",
        help="week by week, where the share of the prompts that is read breaks with its trend; "
        "with --by model for each model",
    )
    parser.add_argument("--format", choices=_FORMATS, default="table")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write there (parquet: needed)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--url", metavar="URL", help=f"the server's address (default: {DEFAULT_URL})"
    )
    source.add_argument(
        "--database",
        metavar="URL",
        help="the ledger's own database instead, as ledger.url names it; its password from "
        f"--password-file or the variable {PASSWORD_VARIABLE}",
    )
    source.add_argument(
        "--directory", metavar="DIR", type=Path, help="SQLite's, as ledger.directory names it"
    )
    parser.add_argument(
        "--password-file", metavar="FILE", type=Path, help="file with the database's password"
    )
    # As with the token: not an abbreviation of the other one.
    parser.add_argument("--password", help=argparse.SUPPRESS)
    parser.add_argument(
        "--prices",
        metavar="FILE",
        type=Path,
        help="what tokens cost, with --database or --directory; a server has its own",
    )
    add_token_arguments(parser)
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    is_local = arguments.database is not None or arguments.directory is not None
    if arguments.format == "parquet" and arguments.output is None:
        parser.error("--format parquet: name a file with --output")
    if arguments.phases and arguments.format in ("csv", "parquet"):
        parser.error("--phases: allowed are --format table and json")
    if arguments.prices is not None and not is_local:
        parser.error("--prices: a server has its own; allowed with --database or --directory")
    try:
        answer = _from_database(arguments) if is_local else _from_server(arguments)
        _write(answer, arguments)
    except ConfigError as error:
        parser.error(str(error.args[0]))
    except UsageError as error:
        print(f"cachescope usage: {error}", file=sys.stderr)
        return 1
    return 0


def _from_server(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the answer of a running server.

    Raises:
        ConfigError: if the token stands on the command line, or its file cannot be read.
        UsageError: if the server cannot be reached, or refuses.
    """
    token = read_token(arguments)
    names = ("since", "until", "by", "org", "session", "model")
    fields = {name: value for name in names if (value := getattr(arguments, name))}
    if arguments.phases:
        fields["phases"] = "true"
    base = (arguments.url or DEFAULT_URL).rstrip("/")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{base}/cachescope/usage?{urlencode(fields)}", None, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise UsageError(f"{base}: {_refusal(error)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{base}: {error}") from None
    if not isinstance(answer, dict) or "by" not in answer:
        raise UsageError(f"{base}: this is not a server with CacheScope")
    return answer


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error)


def _from_database(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the ledger's database has.

    Raises:
        ConfigError: if the address, the password's file or the file of prices cannot be used.
        UsageError: if the database cannot be read, or the query is wrong.
    """
    try:
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError

        from vllm_cachescope.usage import database, usage_ledger
        from vllm_cachescope.usage.prices import Prices, read_prices
        from vllm_cachescope.usage.query import Query
    except ImportError as error:
        raise UsageError(
            f"this needs SQLAlchemy ({error}); install it with pip install "
            "'vllm-cachescope[ledger]'"
        ) from None
    from vllm_cachescope.usage.period import parse_time

    if arguments.directory is not None:
        file = arguments.directory / FILE
        if not file.is_file():
            # SQLite would make one.
            raise UsageError(f"{file}: there is no such file")
        url = URL.create("sqlite", database=str(file.absolute()))
    else:
        url = database.parse(arguments.database, "--database")
        if url.password is not None or arguments.password is not None:
            raise ConfigError(
                "--database: a password may not stand on a command line, which others can read; "
                f"allowed: --password-file, or the variable {PASSWORD_VARIABLE}"
            )
        password = secret_text(
            None, arguments.password_file, "password", PASSWORD_VARIABLE, shortest=1
        )
        if password is not None:
            url = url.set(password=password)
    prices = Prices() if arguments.prices is None else read_prices(arguments.prices, "--prices")
    now = time.time()
    try:
        since = parse_time(arguments.since or ("90d" if arguments.phases else "1d"), now)
        query = Query(
            since,
            parse_time(arguments.until or "now", now),
            Query.read_by(arguments.by),
            arguments.org,
            arguments.session,
            arguments.model,
        )
        with database.connect(url).connect() as connection:
            if arguments.phases:
                return usage_ledger.phases_of(connection, query)
            return usage_ledger.usage_of(connection, query, prices, max_rows=1_000_000)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except SQLAlchemyError as error:
        raise UsageError(f"the ledger cannot be read: {database.describe(error)}") from None


def _write(answer: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the answer in the format that is asked for.

    Raises:
        UsageError: if it cannot be written.
    """
    from vllm_cachescope.usage.export import to_csv, to_parquet

    output: Path | None = arguments.output
    try:
        if arguments.format == "parquet":
            assert output is not None
            to_parquet(answer, output)
            return
        if arguments.format == "table" and output is None:
            if arguments.phases:
                show(lambda console: console.print(phase_table(answer)))
            else:
                show(lambda console: print_usage(console, answer))
            return
    except ImportError as error:
        raise UsageError(
            f"Parquet needs pyarrow ({error}); install it with pip install "
            "'vllm-cachescope[parquet]'"
        ) from None
    except OSError as error:
        raise UsageError(f"{output}: {error}") from None
    if arguments.format == "csv":
        text = to_csv(answer)
    elif arguments.format == "json":
        text = json.dumps(answer, indent=2) + "\n"
    else:
        raise UsageError("--output: allowed with --format csv, json and parquet")
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageError(f"{output}: {error}") from None
