"""``cachescope lint``: finds what will break a prefix before it costs anything."""

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from vllm_cachescope.cli import traffic_files
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.lint_rules import Finding, Severity, lint
from vllm_cachescope.cli.traffic import BlockCall, Call, TrafficError


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lint`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "lint",
        help="find what will break the prefixes of recorded requests",
        description="Look for volatile content in the tools and system prompts of recorded "
        "requests. Exit code: 0; 1 if there is any warning; 2 if a file cannot be "
        "read, or holds no request.",
    )
    traffic_files.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope lint`` and return its exit code."""
    try:
        calls: list[Call] = []
        for path, traffic in traffic_files.read(args):
            calls += (call for call in traffic if isinstance(call, Call))
            if any(isinstance(call, BlockCall) for call in traffic):
                raise TrafficError(f"{path}: holds hashes of blocks, and no text to look at")
    except (OSError, TrafficError) as error:
        print(f"cachescope lint: {error}", file=sys.stderr)
        return 2
    findings = lint(calls)
    if args.json:
        plain = [{**asdict(f), "severity": f.severity.name.lower()} for f in findings]
        print(json.dumps({"requests": len(calls), "findings": plain}, indent=2))
    else:
        show(lambda console: render(findings, len(calls), console))
    return int(any(finding.severity is Severity.WARNING for finding in findings))


def render(findings: list[Finding], requests: int, console: Console) -> None:
    """Print the findings, a line each."""
    for finding in findings:
        warning = finding.severity is Severity.WARNING
        line = Text(f"{finding.source}  ")
        line.append(finding.rule, style="bold red" if warning else "yellow")
        line.append(f" at {finding.path}: {finding.message}")
        if finding.requests > 1:
            line.append(f" ({finding.requests} requests)")
        console.print(line, highlight=False, soft_wrap=True)
    warnings = sum(finding.severity is Severity.WARNING for finding in findings)
    console.print(f"{requests:,} requests, {warnings} warnings, {len(findings) - warnings} notes.")
