"""``cachescope report``: what recorded traffic shared, what it cost, and what could be saved."""

import argparse
import sys
from pathlib import Path

from vllm_cachescope.cli import traffic_files
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.report.call_lines import call_lines
from vllm_cachescope.cli.report.cost_replay import MIN_TOKENS
from vllm_cachescope.cli.report.left_out import LeftOutLines
from vllm_cachescope.cli.report.ordered_calls import ordered_calls
from vllm_cachescope.cli.report.page import write_page
from vllm_cachescope.cli.report.progress import with_progress
from vllm_cachescope.cli.report.recording import Recording
from vllm_cachescope.cli.report.report_json import json_pieces
from vllm_cachescope.cli.report.summary import summarise
from vllm_cachescope.cli.report.tables import render
from vllm_cachescope.cli.token_counter import DEFAULT, TokenizerError, load_counter
from vllm_cachescope.cli.traffic import EXPECTED, TrafficError
from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.durations import parse_duration
from vllm_cachescope.usage.prices import ANY_MODEL, ModelPrice, Prices, read_prices


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``report`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "report",
        help="say what recorded traffic shared, what it cost, and what could be saved",
        description="Read recorded requests and say what each call, lineage and phase shared, "
        "where prefixes broke, what the prompts cost without caching, cached for five minutes and "
        "for an hour, which breakpoints and lifetimes cost least, and what a cache could read "
        "besides that reuses content at other positions. Costs are by the rules of Anthropic's "
        "API. Exit code: 0; 2 if a file cannot be read, or holds no request.",
    )
    traffic_files.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, every call")
    parser.add_argument("--calls", action="store_true", help="print a line for each call as well")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page with a timeline")
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT,
        metavar="NAME",
        help="a folder with a tokenizer.json, such as a model's, such a file, or a name on the "
        "Hugging Face hub; otherwise a small tokenizer that comes with this package",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prices", type=Path, metavar="FILE", help="a file of prices, in YAML")
    group.add_argument(
        "--price", type=_amount, metavar="USD", help="a million input tokens of every model"
    )
    parser.add_argument(
        "--gap",
        type=_duration,
        default=10,
        metavar="TIME",
        help="how long after the call before it one was made that tells no time (default 10s)",
    )
    parser.add_argument(
        "--min-tokens",
        type=_count,
        default=MIN_TOKENS,
        metavar="N",
        help=f"tokens of the shortest prefix that is cached (default {MIN_TOKENS})",
    )
    parser.set_defaults(run=run)


def _duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: write a number, 0 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: write an amount, as in 3.00")
    return amount


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope report`` and return its exit code."""
    left_out = LeftOutLines()
    try:
        prices, counter = _prices(args), load_counter(args.tokenizer)
        recording = Recording(counter, prices, args.gap, args.min_tokens)
        for path, call in with_progress(ordered_calls(args.files, left_out), args.files):
            recording.add(path, call)
        if not recording.calls and not args.allow_empty:
            named = ", ".join(map(str, args.files))
            raise TrafficError(f"{named}: holds no request; {EXPECTED}")
        summary = summarise(recording, prices, counter.name)
        if args.html is not None:
            write_page(args.html, summary, recording)
    except (ConfigError, OSError, TokenizerError, TrafficError) as error:
        print(f"cachescope report: {error}", file=sys.stderr)
        return 2
    finally:
        if left_out:
            print(left_out, file=sys.stderr)
    if args.json:
        for piece in json_pieces(summary, recording):
            print(piece, end="")
    else:
        show(lambda console: render(summary, console))
        if args.calls:
            for line in call_lines(recording):
                print(line)
    return 2 if args.strict and left_out else 0


def _prices(args: argparse.Namespace) -> Prices:
    if args.prices is not None:
        return read_prices(args.prices, "--prices")
    if args.price is not None:
        return Prices({ANY_MODEL: ModelPrice(args.price)})
    return Prices()
