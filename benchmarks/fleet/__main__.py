"""``python -m benchmarks.fleet``: two replicas behind each router, with agents of four tenants.

``make frontends`` installs the routers. What is not installed is said in the table.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fleet import kept, load, table
from benchmarks.fleet.installed import REDIS
from benchmarks.fleet.measure import Plan, absent, measure
from benchmarks.fleet.measured import Measured
from benchmarks.fleet.router import Choices, Router
from benchmarks.fleet.row import Row, all_rows, quick_rows, table_rows
from benchmarks.fleet.run import Run
from benchmarks.fleet.size import SIZES
from benchmarks.fleet.target import verdicts
from benchmarks.harness import RESULTS, console

SEED = 0

ROOT = Path(__file__).parents[2]


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
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often all rows are run, in turn (default 1)"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="to what was measured of the same load with the same code, and print all of it",
    )
    parser.add_argument(
        "--quote",
        action="store_true",
        help="run nothing: put what was measured so into docs/fleet.md and README.md",
    )
    parser.add_argument("--trace", type=Path, nargs="+", help="recorded prompts instead")
    parser.add_argument(
        "--turns", type=int, help="most calls of a session (default 6; with --quick 3)"
    )
    parser.add_argument(
        "--pace",
        type=float,
        help="what pauses are multiplied with (default 0.5; with --quick 0.25)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "fleet", help="where to write")
    return parser.parse_args()


def main() -> int:
    """Run the rows that were asked for; return 1 if a target was missed or a row failed."""
    options = arguments()
    rows = quick_rows() if options.quick else table_rows()
    if options.only:
        rows = [row for text in options.only for row in all_rows() if text in row.name]
        rows = list(dict.fromkeys(rows))
    if not rows:
        console.print("No row has such a name; --list prints them.")
        return 2
    if options.list:
        console.print(*(row.name for row in all_rows()), sep="\n")
        return 0
    if not REDIS.is_installed:
        console.print("redis-server is not installed")
        return 2
    turns = options.turns or (3 if options.quick else 6)
    pace = options.pace or (0.25 if options.quick else 0.5)
    about = {
        **{"state": kept.state(), "model": options.model, "turns": turns, "pace": pace},
        "traces": [path.name for path in options.trace or ()],
    }
    told: dict[str, list[Run]] = {}
    if options.add or options.quote:
        for name, one in kept.kept(options.results, about):
            told.setdefault(name, []).append(one)
    missing: dict[str, str] = {}
    if not options.quote:
        calls = (
            load.from_traces(options.trace, turns) if options.trace else load.made_up(SEED, turns)
        )
        plan = Plan(SIZES[options.model], calls, pace)
        asked = rows * options.rounds
        for number, (row, run) in enumerate(measure(asked, plan, _recorded(told)), 1):
            if isinstance(run, str):
                missing[row.name] = run
            else:
                kept.add(options.results, about, row.name, run)
                told.setdefault(row.name, []).append(run)
            shown = run if isinstance(run, str) else Measured(row, (run,))
            console.print(f"{number}/{len(asked)} {' | '.join(table.line(row, shown))}")
            # After each row: who stops it has those that are done.
            table.write(options.results, _table(told, missing), about)
    found = _table(told, missing)
    page = table.write(options.results, found, about)
    if options.quote:
        table.quote(ROOT / "docs" / "fleet.md", page.read_text())
        table.quote(ROOT / "README.md", table.short(found))
    print(page.read_text())
    failed = any(isinstance(one, str) and one != absent(row) for row, one in found)
    judged = verdicts([one for _, one in found if isinstance(one, Measured)])
    return 1 if failed or not all(verdict.holds for verdict in judged) else 0


def _table(
    told: dict[str, list[Run]], missing: dict[str, str]
) -> Sequence[tuple[Row, Measured | str]]:
    """Return what there is of each row, in the table's order."""
    found: list[tuple[Row, Measured | str]] = []
    for row in all_rows():
        if row.name in told:
            found.append((row, Measured(row, tuple(told[row.name]))))
        elif row.name in missing:
            found.append((row, missing[row.name]))
    return found


def _recorded(told: dict[str, list[Run]]) -> dict[Router, Choices]:
    """Return what routers chose for plain vLLM, the first time."""
    return {
        row.router: told[row.name][0].chosen
        for row in all_rows()
        if row.router.tells and not row.engine.plugin and not row.replays and row.name in told
    }


if __name__ == "__main__":
    sys.exit(main())
