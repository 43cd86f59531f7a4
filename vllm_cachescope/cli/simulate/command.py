"""The command ``cachescope simulate``."""

import argparse
import json
import random
import sys
from dataclasses import asdict
from typing import Any

from vllm_cachescope.cli import traffic_files
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.simulate import plot, tables
from vllm_cachescope.cli.simulate.answer_endings import EndingsFrom
from vllm_cachescope.cli.simulate.traced_calls import traced, whole_blocks
from vllm_cachescope.cli.traffic import BLOCK_TOKENS, BlockCall, Call, TrafficError
from vllm_cachescope.cli.traffic_files import TrafficFiles
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.durations import parse_duration
from vllm_cachescope.simulation.marked_conversations import mark_conversations
from vllm_cachescope.simulation.policies import POLICIES, make_cache
from vllm_cachescope.simulation.replay import Hits, Outcome, replay
from vllm_cachescope.simulation.traced_request import TracedRequest

_DESCRIPTION = """\
Replay recorded requests against a cache of so many blocks, and say which share of them it would
have read: with the CPU tier's policy, with those of other caches, and with the offline optimum,
which knows the future. Counted by prefix: a block is read if all before it are there.
"""

_EPILOG = """\
examples:
  cachescope simulate trace.jsonl.gz --capacity 1000,5000,20000
  cachescope simulate calls.jsonl --policy learned,lru,belady --plot hits.svg
  cachescope simulate trace.jsonl.gz --mark-long 0.2          hits by TTL, too

exit codes: 0; 2 if a file cannot be read or holds no request, or with --strict if a line was left
out.
"""

_LONG_SHARE = EvictionSettings().long_share
_FRACTIONS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``simulate`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay recorded requests against caches of several sizes and policies",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    traffic_files.add_arguments(parser)
    parser.add_argument(
        "--capacity",
        type=_capacities,
        metavar="N,…",
        help="blocks that the cache holds (default: an eighth, a quarter, a third and half of all "
        "blocks that are read again)",
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        default=POLICIES,
        metavar="NAME,…",
        help=f"of {', '.join(POLICIES)} (default: all)",
    )
    parser.add_argument(
        "--block-tokens",
        type=int,
        default=16,
        metavar="N",
        help=f"tokens of a block (default: 16); block traces have {BLOCK_TOKENS}",
    )
    parser.add_argument(
        "--ttl",
        type=_ttl,
        metavar="TTL",
        help="TTL where a request names none, such as 5m (default: blocks do not expire)",
    )
    parser.add_argument(
        "--whole-blocks",
        action="store_true",
        help="leave out last blocks that are not full, which engines do not cache",
    )
    parser.add_argument(
        "--mark-long",
        type=_share,
        metavar="SHARE",
        help="mark so many of the conversations 1h, drawn at random, and the others 5m",
    )
    parser.add_argument(
        "--endings",
        type=EndingsFrom,
        choices=list(EndingsFrom),
        default=EndingsFrom.ALL,
        help="what tells the policy how answers ended, as a server does: the recorded answers, or, "
        "where none is recorded, also the requests that follow (all, the default); the recorded "
        "answers alone (recorded); nothing (none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--long-share",
        type=_share,
        default=_LONG_SHARE,
        metavar="SHARE",
        help=f"eviction.long_share (default: {_LONG_SHARE})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw hits over capacities, as .svg, .png or .pdf"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope simulate`` and return its exit code."""
    files = TrafficFiles(args)
    calls: list[Call | BlockCall] = []
    try:
        for _, traffic in files.read():
            calls += traffic
        requests = traced(calls, args.block_tokens, args.ttl, args.endings)
        if args.plot is not None:
            plot.check()
    except (OSError, TrafficError, plot.NoPlotError) as error:
        files.tell("simulate")
        print(f"cachescope simulate: {error}", file=sys.stderr)
        return 2
    files.tell("simulate")
    block_tokens = BLOCK_TOKENS if isinstance(calls[0], BlockCall) else args.block_tokens
    if args.whole_blocks:
        requests = list(whole_blocks(requests))
    if args.mark_long is not None:
        requests = mark_conversations(requests, args.mark_long, random.Random(args.seed))
    capacities = args.capacity or _default_capacities(requests)
    outcomes = {
        (policy, capacity): replay(
            requests, make_cache(policy, capacity, requests, args.long_share), block_tokens
        )
        for policy in args.policy
        for capacity in capacities
    }
    if args.json:
        print(json.dumps([_plain(*key, outcome) for key, outcome in outcomes.items()], indent=2))
    else:
        show(lambda console: tables.render(console, requests, block_tokens, outcomes))
    if args.plot is not None:
        plot.draw(outcomes, args.plot)
    return 2 if files.fails else 0


def _plain(policy: str, capacity: int, outcome: Outcome) -> dict[str, Any]:
    def plain(hits: Hits) -> dict[str, Any]:
        ratios = {"block_hit_ratio": hits.ratio, "token_hit_ratio": hits.token_ratio}
        return asdict(hits) | ratios

    return {
        "policy": policy,
        "capacity": capacity,
        **plain(outcome.total),
        "by_ttl": [{"ttl_s": ttl, **plain(hits)} for ttl, hits in outcome.by_ttl.items()],
        "by_org": [{"org": org, **plain(hits)} for org, hits in outcome.by_org.items()],
        "evictions": outcome.evictions,
        "most_blocks": outcome.most_blocks,
        "seconds": outcome.seconds,
    }


def _default_capacities(requests: list[TracedRequest]) -> tuple[int, ...]:
    seen: set[bytes] = set()
    again: set[bytes] = set()
    for request in requests:
        again.update(key for key in request.keys if key in seen)
        seen.update(request.keys)
    return tuple(max(1, round(len(again) * part)) for part in _FRACTIONS)


def _capacities(text: str) -> tuple[int, ...]:
    try:
        capacities = tuple(int(one) for one in text.split(","))
    except ValueError:
        capacities = (0,)
    if min(capacities) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of blocks, as in 1000,5000")
    return capacities


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r}: allowed: {', '.join(POLICIES)}")
    return names


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 to 1")
    return share


def _ttl(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
