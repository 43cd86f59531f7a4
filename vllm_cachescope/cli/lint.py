"""``cachescope lint``: finds what will break a prefix before it costs anything."""

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from vllm_cachescope.cli import fix_render, traffic_files
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.findings import rules
from vllm_cachescope.cli.findings.machine_forms import Located, annotations, sarif
from vllm_cachescope.cli.findings.rules import RULES, Level, Selection
from vllm_cachescope.cli.fixing import FixError, fix_files
from vllm_cachescope.cli.lint_rules import Finding, Severity, lint
from vllm_cachescope.cli.traffic import BlockCall, Call, LeftOut, TrafficError
from vllm_cachescope.cli.traffic_files import TrafficFiles

_DESCRIPTION = """\
Look in recorded requests for what breaks the prefix of the next one: values in tools and system
prompts that are other ones in each request, tools and keys in varying order, breakpoints in the
wrong place. With --fix, write a corrected copy, and list each change with what it would have saved.
"""

_EPILOG = """\
examples:
  cachescope lint calls.jsonl
  cachescope lint calls.jsonl --allow date --forbid CS809    for CI
  cachescope lint calls.jsonl --fix                    writes calls.fixed.jsonl
  cachescope lint calls.jsonl --fix --output new.jsonl

exit codes: 0; 1 if there is any warning that --allow does not name, or a finding of a rule that
--forbid does; 2 if a file cannot be read or holds no request, or with --strict if a line was left
out.
"""


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lint`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "lint",
        help="find what will break the prefixes of recorded requests, and mend it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    traffic_files.add_arguments(parser)
    parser.add_argument(
        "--format",
        choices=("text", "json", "sarif", "github"),
        default="text",
        help="text; json; sarif, for code scanning; github, annotations of a workflow "
        "(default: text)",
    )
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="short for --format json"
    )
    fix = parser.add_argument_group("to mend it")
    fix.add_argument(
        "--fix",
        action="store_true",
        help="write a corrected copy: tools and keys in one order, volatile values behind the last "
        "breakpoint, breakpoints where they pay. What would change the meaning is left as it is",
    )
    fix.add_argument(
        "--output",
        metavar="FILE",
        help="where to write the copy (default: beside the file, as NAME.fixed.jsonl); - is "
        "standard output",
    )
    fix.add_argument("--in-place", action="store_true", help="replace the file itself")
    job = parser.add_argument_group("for CI")
    rules.add_arguments(job)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope lint`` and return its exit code."""
    files = TrafficFiles(args)
    calls: list[Call] = []
    try:
        if args.fix:
            return fix_render.run(args, fix_files(args.files, args.output, args.in_place))
        for path, traffic in files.read():
            calls += (call for call in traffic if isinstance(call, Call))
            if any(isinstance(call, BlockCall) for call in traffic):
                raise TrafficError(f"{path}: holds hashes of blocks, and no text to look at")
    except (OSError, TrafficError, FixError) as error:
        files.tell("lint")
        print(f"cachescope lint: {error}", file=sys.stderr)
        return 2
    files.tell("lint")
    findings = [*map(_refused, (one for one in files.left_out if one.refused)), *lint(calls)]
    _print(args, findings, len(calls))
    if files.fails:
        return 2
    return int(_fails(findings, rules.selection(args)))


def _refused(one: LeftOut) -> Finding:
    path, _, said = one.reason.partition(": ")
    return Finding("refused_request", Severity.WARNING, path, said, one.source)


def _fails(findings: list[Finding], selection: Selection) -> bool:
    return any(
        selection.forbids(RULES[one.rule])
        or (one.severity is Severity.WARNING and not selection.allows(RULES[one.rule]))
        for one in findings
    )


def _print(args: argparse.Namespace, findings: list[Finding], requests: int) -> None:
    if args.format == "json":
        plain = [
            {"code": f.code, **asdict(f), "severity": f.severity.name.lower()} for f in findings
        ]
        print(json.dumps({"requests": requests, "findings": plain}, indent=2))
    elif args.format == "sarif":
        print(json.dumps(sarif(map(_located, findings)), indent=2))
    elif args.format == "github":
        print("".join(f"{line}\n" for line in annotations(map(_located, findings))), end="")
    else:
        show(lambda console: render(findings, requests, console))


def _located(finding: Finding) -> Located:
    level = Level.WARNING if finding.severity is Severity.WARNING else Level.NOTE
    message = f"{finding.path}: {finding.message}"
    properties = {"requests": finding.requests, "path": finding.path}
    return Located(RULES[finding.rule], level, message, [finding.source], properties)


def render(findings: list[Finding], requests: int, console: Console) -> None:
    """Print the findings, a line each."""
    for finding in findings:
        warning = finding.severity is Severity.WARNING
        line = Text(f"{finding.source}  ")
        line.append(f"{finding.code} {finding.rule}", style="bold red" if warning else "yellow")
        line.append(f" at {finding.path}: {finding.message}")
        if finding.requests > 1:
            line.append(f" ({finding.requests} requests)")
        console.print(line, highlight=False, soft_wrap=True)
    warnings = sum(finding.severity is Severity.WARNING for finding in findings)
    console.print(f"{requests:,} requests, {warnings} warnings, {len(findings) - warnings} notes.")
