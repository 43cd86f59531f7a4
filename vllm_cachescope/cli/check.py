"""``cachescope check``: says what is wrong with a launch before a model is loaded."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_cachescope.cli import launch
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.launch import LaunchError
from vllm_cachescope.config import ConfigError
from vllm_cachescope.connectors.vllm import preflight
from vllm_cachescope.connectors.vllm.findings import Finding, Status

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``check`` to the command line; ``run(args)`` of the parsed arguments runs it.

    ``args.vllm_arguments`` has to be set by then: the arguments that no parser knows.
    """
    parser = subparsers.add_parser(
        "check",
        usage=f"cachescope check {launch.USAGE}",
        help="say what is wrong with a configuration and its surroundings",
        description="Takes the arguments of serve, and looks at all that a start needs, without "
        "loading the model. Exit code: 0; 1 on a failure; 2 if the arguments are wrong.",
        allow_abbrev=False,
    )
    launch.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope check`` and return its exit code."""
    try:
        described = launch.read(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"cachescope check: {error}", file=sys.stderr)
        return 2
    findings = list(
        preflight.check(described.model, described.extra_config, described.vllm_arguments)
    )
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        show(lambda console: render(findings, console))
    return int(any(finding.status is Status.FAILURE for finding in findings))


def render(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table, and how many there are that matter."""
    table = Table()
    table.add_column("what", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what helps", overflow="fold")
    for finding in findings:
        status = Text(finding.status.value, style=_STYLES[finding.status])
        table.add_row(Text(finding.subject), status, Text(finding.found), Text(finding.remedy))
    console.print(table)
    failures, warnings = (
        sum(finding.status is status for finding in findings)
        for status in (Status.FAILURE, Status.WARNING)
    )
    console.print(f"{failures} failures, {warnings} warnings.")
