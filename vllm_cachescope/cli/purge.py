"""``cachescope purge``: purges entries of running servers."""

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any

from vllm_cachescope.cli import store_purge
from vllm_cachescope.cli.launch import add_setting_arguments, read_settings
from vllm_cachescope.cli.server_access import DEFAULT_URL, add_token_arguments, read_token
from vllm_cachescope.config import SECRET_VARIABLE, ConfigError

_TIMEOUT_S = 180  # a server may take this long: longer than it gives its slowest tier


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``purge`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "purge",
        help="purge cached entries of running servers",
        description="Purges the entries of an organisation, of one of its sessions, or all, on "
        "every tier, and says how many. Replicas that share a Redis purge as well, and are named "
        "once they have; others have to be named here. With --redis or --cachescope no server is "
        "asked: the engines on the Redis hear of it there, whatever front end they have. The exit "
        "status is 1 if a server or a tier could not be reached, or a replica has not said that "
        "it is done.",
    )
    parser.add_argument(
        "--org",
        metavar="NAME",
        help="the organisation: its name in tenants, its name for the gateway, or its id as "
        "GET /cachescope/breaks shows it; 'global' for what everyone shares",
    )
    parser.add_argument(
        "--session",
        metavar="ID",
        help="one session of it; without --org, of the API key's organisation, or for the "
        "operator of requests without a key",
    )
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument(
        "--url",
        metavar="URL",
        action="append",
        help="a server's address, once for each server that shares no Redis with another "
        f"(default: {DEFAULT_URL})",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="the Redis of engines without a server in Python; needs their secret, in the variable "
        f"{SECRET_VARIABLE} or in the configuration",
    )
    add_setting_arguments(parser)
    add_token_arguments(parser)
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    named = {"org": arguments.org, "session": arguments.session}
    body: dict[str, object] = {name: value for name, value in named.items() if value}
    if bool(body) == arguments.all:
        parser.error("say what: --org NAME, --session ID or both, or --all")
    if arguments.all:
        body = {"all": True}
    try:
        if arguments.redis or arguments.cachescope or arguments.set:
            if arguments.url:
                parser.error("--url names a server, and --redis and --cachescope go without one")
            settings = read_settings(arguments.cachescope, arguments.set)
            config = store_purge.settings_of(arguments.redis, settings)
            return 0 if store_purge.purge(config, arguments.org, arguments.session) else 1
        token = read_token(arguments)
    except ConfigError as error:
        parser.error(str(error.args[0]))
    reached = [purge(url, body, token) for url in arguments.url or [DEFAULT_URL]]
    return 0 if all(reached) else 1


def purge(url: str, body: dict[str, object], token: str | None) -> bool:
    """Purge entries of one server and print how many. Return whether all of its tiers were
    reached.

    Args:
        url: the server's address, as in ``http://localhost:8000``.
        body: what to purge, as ``POST /cachescope/purge`` takes it.
        token: the bearer token; None for none.
    """
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(
        f"{url.rstrip('/')}/cachescope/purge", json.dumps(body).encode(), headers, method="POST"
    )
    try:
        answer = _answer(request)
    except OSError as problem:
        print(f"{url}: {problem}", file=sys.stderr)
        return False
    if "error" in answer:
        error = answer["error"]
        message = error.get("message") if isinstance(error, dict) else error
        print(f"{url}: {message}", file=sys.stderr)
        return False
    counts = ", ".join(f"{tier} {entries}" for tier, entries in answer["purged"].items())
    print(f"{url}: entries forgotten: {counts}")
    for tier, reason in answer["unreached"].items():
        print(f"{url}: {tier} could not be reached: {reason}", file=sys.stderr)
    others = answer["replicas"]
    if others["confirmed"]:
        print(f"{url}: done as well: {_named(others['confirmed'])}")
    if others["missing"]:
        print(f"{url}: not known to be done: {_named(others['missing'])}", file=sys.stderr)
    return not answer["unreached"] and not others["missing"]


def _named(replicas: list[str] | dict[str, str] | int) -> str:
    """Return replicas in words; who is not the operator is told their number only."""
    if isinstance(replicas, int):
        return f"{replicas} other replica{'s' if replicas > 1 else ''}"
    if isinstance(replicas, dict):
        return "; ".join(f"{name} ({reason})" for name, reason in replicas.items())
    return ", ".join(replicas)


def _answer(request: urllib.request.Request) -> dict[str, Any]:
    """Return the server's JSON answer, which may be a refusal.

    Raises:
        OSError: if there is no server, or its answer is not one of CacheScope's.
    """
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        try:
            answer = json.load(error)
        except ValueError:
            raise error from None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not {"purged", "error"} & answer.keys():
        raise OSError("this is not a server with CacheScope")
    return answer
