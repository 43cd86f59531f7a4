"""``python -m benchmarks.fleet``: two replicas behind each router, with agents of four tenants.

``make frontends`` installs the routers. What is not installed is said in the table.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.fleet import load, table
from benchmarks.fleet.installed import REDIS
from benchmarks.fleet.measure import Plan, absent, measure
from benchmarks.fleet.row import Measured, Row, all_rows, quick_rows
from benchmarks.fleet.size import SIZES
from benchmarks.fleet.target import verdicts
from benchmarks.harness import RESULTS, console

SEED = 0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows and turns")
    parser.add_argument(
        "--model", choices=SIZES, default="tiny", help="the replicas' (default tiny)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="rows whose name has this in it, in this order; several times for several",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and end")
    parser.add_argument("--trace", type=Path, nargs="+", help="recorded prompts instead")
    parser.add_argument(
        "--turns", type=int, help="most calls of a session (default 8; with --quick 4)"
    )
    parser.add_argument(
        "--pace", type=float, default=0.5, help="what pauses are multiplied with (default 0.5)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "fleet", help="where to write")
    return parser.parse_args()


def main() -> int:
    """Run the rows that were asked for; return 1 if a target was missed or a row failed."""
    options = arguments()
    rows = quick_rows() if options.quick and not options.only else all_rows()
    if options.only:
        rows = list(dict.fromkeys(row for text in options.only for row in rows if text in row.name))
    if not rows:
        console.print("No row has such a name; --list prints them.")
        return 2
    if options.list:
        console.print(*(row.name for row in rows), sep="\n")
        return 0
    if not REDIS.is_installed:
        console.print("redis-server is not installed")
        return 2
    turns = options.turns or (4 if options.quick else 8)
    calls = load.from_traces(options.trace, turns) if options.trace else load.made_up(SEED, turns)
    plan = Plan(SIZES[options.model], calls, options.pace)
    found: list[tuple[Row, Measured | str]] = []
    about = {"model": options.model, "turns": turns, "pace": options.pace}
    about["recorded"] = bool(options.trace)
    for row, measured in measure(rows, plan):
        found.append((row, measured))
        console.print(f"{len(found)}/{len(rows)} {' | '.join(table.line(row, measured))}")
        judged = verdicts([one for _, one in found if isinstance(one, Measured)])
        # After each row: who stops it has those that are done.
        page = table.write(options.results, found, judged, about)
    print(page.read_text())
    failed = any(isinstance(one, str) and one != absent(row) for row, one in found)
    return 1 if failed or not all(verdict.holds for verdict in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
