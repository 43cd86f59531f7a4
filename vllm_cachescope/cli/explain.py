"""``cachescope explain``: says of recorded traffic where prefixes broke, and why."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from vllm_cachescope.cli import (
    explain_render,
    heat_map,
    repairing,
    tokens_of_model,
    traffic_files,
)
from vllm_cachescope.cli.block_trace import explain_blocks
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.explaining import explain
from vllm_cachescope.cli.explanation import Explained, Explanation
from vllm_cachescope.cli.findings import rules
from vllm_cachescope.cli.findings.group import Group, grouped
from vllm_cachescope.cli.findings.machine_forms import Located, annotations, sarif
from vllm_cachescope.cli.repairing import RepairTrial
from vllm_cachescope.cli.shared_prefixes import SharedPrefixes
from vllm_cachescope.cli.token_counter import TokenizerError
from vllm_cachescope.cli.tokens_of_model import ModelError
from vllm_cachescope.cli.traffic import BlockCall, Call, TrafficError
from vllm_cachescope.cli.traffic_files import TrafficFiles
from vllm_cachescope.config import ConfigError
from vllm_cachescope.durations import parse_duration

_DESCRIPTION = """\
Read recorded requests and say where the prefix of a prompt broke or was lost, why, and what to do:
first a summary, one paragraph for each rule and place, the most tokens first; then what was not
read, by cause.

A cache is taken to hold what a breakpoint covers (without breakpoints, everything) for the lifetime
that the breakpoint asks for, five minutes where it names none, counted from the last use by any
conversation that shares it. Where responses are recorded, their usage counts instead. Other counts
are estimates, at four bytes a token, unless --tokenizer or --model is given.
"""

_EPILOG = """\
examples:
  cachescope explain calls.jsonl                      the summary
  cachescope explain calls.jsonl --all --heat-map     each break, and a picture of each session
  cachescope explain calls.jsonl --ttl 1h             as if everything were kept for an hour
  cachescope explain calls.jsonl --repair             and what a server's repairs would have saved
  cachescope explain calls.jsonl --max-breaks 0       for CI: exit with 1 if anything breaks ...
      --allow expired,CS204 --forbid context_compacted  ... but for these, and on this
  cachescope explain calls.har --format github        annotations on a pull request

exit codes: 0; 1 if more calls lost something unexpected than --max-breaks, or a rule of --forbid
was found; 2 if a file cannot be read or holds no request, or with --strict if a line was left out.
"""


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``explain`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "explain",
        help="say where the prefixes of recorded traffic broke, and why",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    traffic_files.add_arguments(parser)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--all", action="store_true", help="list each break, too")
    shown.add_argument(
        "--heat-map",
        action="store_true",
        help="draw each session: what of each prompt was read, lost or new",
    )
    shown.add_argument(
        "--no-text", action="store_true", help="quote nothing of what changed in a prompt"
    )
    shown.add_argument(
        "--format",
        choices=("text", "json", "sarif", "github"),
        default="text",
        help="text; json, with every call; sarif, for code scanning; github, annotations of a "
        "workflow (default: text)",
    )
    shown.add_argument(
        "--json", dest="format", action="store_const", const="json", help="short for --format json"
    )
    cache = parser.add_argument_group("what the cache is like")
    cache.add_argument(
        "--ttl",
        type=_duration,
        metavar="TTL",
        help="keep everything that long, as in 5m, whatever the requests ask for; none for ever",
    )
    cache.add_argument(
        "--block-size",
        type=_positive,
        metavar="N",
        help="count whole blocks of N tokens only, and say what that costs",
    )
    tokens_of_model.add_arguments(cache)
    repairing.add_arguments(cache)
    job = parser.add_argument_group("for CI")
    job.add_argument("--max-breaks", type=_count, metavar="N", help="unexpected breaks to allow")
    rules.add_arguments(job)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: write a number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not (count := _count(text)):
        raise argparse.ArgumentTypeError("a block has at least 1 token")
    return count


def _duration(text: str) -> float:
    if text == "none":
        return math.inf
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope explain`` and return its exit code."""
    files = TrafficFiles(args)
    explanation, recorded = Explanation(), list[Call]()
    trial = None
    try:
        choice = repairing.chosen(args)
        count, block = tokens_of_model.read(args, args.block_size)
        prefixes = SharedPrefixes(args.ttl, count)
        for _, calls in files.read():
            if choice is not None:
                recorded += (call for call in calls if isinstance(call, Call))
            explanation.calls.extend(
                explain_calls(calls, args.ttl, prefixes, not args.no_text, block)
            )
        if choice is not None:
            trial = repairing.try_repairs(recorded, choice, args.ttl, prefixes)
    except (OSError, TrafficError, TokenizerError, ModelError, ConfigError) as error:
        files.tell("explain")
        print(f"cachescope explain: {error}", file=sys.stderr)
        return 2
    files.tell("explain")
    groups = grouped(explanation.calls)
    selection = rules.selection(args)
    unexpected = sum(
        any(loss.is_break and not selection.allows(loss.rule) for loss in call.losses)
        for call in explanation.calls
    )
    _print(args, explanation, groups, files, trial)
    if files.fails:
        return 2
    forbidden = any(selection.forbids(group.loss.rule) for group in groups)
    return int(forbidden or (args.max_breaks is not None and unexpected > args.max_breaks))


def _print(
    args: argparse.Namespace,
    explanation: Explanation,
    groups: list[Group],
    files: TrafficFiles,
    trial: RepairTrial | None,
) -> None:
    if args.format == "json":
        data = {
            **explanation.to_dict(),
            "findings": [group.to_dict() for group in groups],
            "left_out": [{"source": one.source, "reason": one.reason} for one in files.left_out],
            **({} if trial is None else {"repairs": trial.to_dict()}),
        }
        print(json.dumps(data, indent=2))
    elif args.format == "sarif":
        print(json.dumps(sarif(map(_located, groups)), indent=2))
    elif args.format == "github":
        print("".join(f"{line}\n" for line in annotations(map(_located, groups))), end="")
    else:
        show(lambda console: explain_render.render(explanation, groups, console, each=args.all))
        if trial is not None:
            show(partial(repairing.render, trial))
        if args.heat_map:
            show(lambda console: heat_map.render(explanation.calls, console))


def _located(group: Group) -> Located:
    loss = group.loss
    at = f" at {loss.path}" if loss.path else ""
    advice = f" {loss.suggestion}" if loss.suggestion else ""
    message = f"{group.tokens:,} tokens of {group.calls:,} calls{at}: {loss.words}.{advice}"
    properties: dict[str, Any] = {
        key: value for key, value in group.to_dict().items() if key in ("calls", "tokens", "place")
    }
    return Located(loss.rule, loss.rule.level, message, group.sources, properties)


def explain_calls(
    calls: Sequence[Call] | Sequence[BlockCall],
    ttl_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
    text: bool = True,
    block_tokens: int | None = None,
) -> Iterator[Explained]:
    """Explain the calls of one file.

    Args:
        calls: what `read_traffic` has read.
        ttl_s: see `explaining.explain` and `block_trace.explain_blocks`.
        prefixes: what the calls of other files have left; None for nothing.
        text: whether what changed is quoted.
        block_tokens: tokens in a block; None to count as though prefixes could end anywhere.
    """
    if calls and isinstance(calls[0], BlockCall):
        yield from explain_blocks((c for c in calls if isinstance(c, BlockCall)), ttl_s)
    else:
        requests = (c for c in calls if isinstance(c, Call))
        yield from explain(requests, ttl_s, prefixes, text, block_tokens)
