"""How well, how fast and in how much memory `cachescope explain` names what broke a prefix.

Sessions with one known cause each are explained, and a large recording. With
``PEERS=FOLDER`` in the environment, the folder of an environment's programs, the peers that are
installed there do the same:
``python -m venv v && v/bin/pip install cachelint kvlint prefixcash promptcachelint
prompt-cache-doctor`` and ``PEERS=v/bin``.

Times are of the processor, so that what else runs counts little.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.broken_sessions import START, broken_sessions
from benchmarks.diagnosis import conversation
from benchmarks.explain_peers import RIGHT, WRONG, Records, Tool, tools
from benchmarks.harness import Result, arguments, finish

_MEGABYTES = 100

_WATCH = """
import resource, subprocess, sys
with open(sys.argv[1], "wb") as file:
    subprocess.run(sys.argv[2:], stdout=file, stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""
_MARK = {RIGHT: "●", "partly": "◐", WRONG: "○"}


def run(command: list[str], output: Path) -> tuple[str, float, float]:
    """Run a command; return what it printed, its processor time in seconds and its memory in MB."""
    # A process counts the memory of the one that it was forked from: a small one is put between.
    watched = [sys.executable, "-c", _WATCH, str(output), *command]
    said = subprocess.run(watched, capture_output=True, text=True, check=True).stdout
    seconds, kilobytes = map(float, said.split())
    return output.read_text(errors="replace"), seconds, kilobytes / 1000


def large_recording(megabytes: int) -> Records:
    """Return recorded requests of several agents, of so many megabytes."""
    records: Records = []
    size, seed = 0, 0
    while size < megabytes * 1_000_000:
        for i, body in enumerate(conversation(seed)):
            at = START + 1000 * seed + 20 * i
            records.append({"timestamp": at, "session_id": f"s{seed}", "body": body})
            size += len(json.dumps(body))
        seed += 1
    return records


def installed(programs: Path, folder: Path) -> list[tuple[Tool, Path]]:
    """Return the tools that are there, each with where its program is."""
    ours, *others = tools(folder)
    found = [(ours, Path(sys.executable).with_name("cachescope"))]
    for tool in others:
        if Path(tool.command(programs, folder)[0]).exists():
            found.append((tool, programs))
        elif programs != Path():
            print(f"{tool.name} is not installed in {programs}")
    return found


def explained(
    tool: Tool, programs: Path, records: Records, folder: Path
) -> tuple[str, float, float]:
    """Have a tool explain a recording; return as `run` does."""
    file = folder / "recording.jsonl"
    with file.open("w") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in tool.write(records))
    return run(tool.command(programs, file), folder / "printed")


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("explain", options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = installed(Path(os.environ.get("PEERS", "")), folder)
        sessions = broken_sessions()
        table = Table(title="● right ◐ partly ○ wrong", title_justify="left")
        table.add_column("session", no_wrap=True)
        for tool, _ in there:
            table.add_column(tool.name, overflow="fold")
        verdicts: dict[str, Counter[str]] = {tool.name: Counter() for tool, _ in there}
        for session in sessions:
            row = [session.name]
            for tool, programs in there:
                printed, _, _ = explained(tool, programs, session.records, folder)
                try:
                    verdict = tool.judge(session, printed)
                except ValueError:
                    verdict = WRONG
                verdicts[tool.name][verdict] += 1
                row.append(_MARK[verdict])
            table.add_row(*row)
        Console().print(table)
        large = large_recording(10 if options.quick else _MEGABYTES)
        seconds: dict[str, float] = {}
        for tool, programs in there:
            counted = verdicts[tool.name]
            ours = tool is there[0][0]
            result.add(
                f"{tool.name}: right of {len(sessions)}",
                [counted[RIGHT]],
                f"({counted['partly']} partly)",
                "all" if ours else "",
                (lambda right: right == len(sessions)) if ours else None,
            )
            _, seconds[tool.name], memory = explained(tool, programs, large, folder)
            result.add(f"{tool.name}: a large recording", [seconds[tool.name]], "s")
            result.add(f"{tool.name}: its memory", [memory], "MB")
        if len(there) > 1:
            own = seconds[there[0][0].name]
            rest = [seconds[tool.name] for tool, _ in there[1:] if tool.compares]
            result.add(
                "the fastest peer that compares prompts, over ours",
                [min(rest) / own],
                "×",
                "over 1",
                lambda ratio: ratio > 1,
            )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
