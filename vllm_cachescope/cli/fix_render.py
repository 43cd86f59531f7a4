"""What ``cachescope lint --fix`` prints: each change with what it saves, and what it left."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_cachescope.cli.findings.rules import RULES
from vllm_cachescope.cli.fixing import Fixed
from vllm_cachescope.cli.traffic import STANDARD_INPUT


def run(args: argparse.Namespace, copies: Iterable[Fixed]) -> int:
    """Print what was done, and return the command's exit code."""
    done = list(copies)
    piped = any(one.output == STANDARD_INPUT for one in done)
    # Where the copy itself goes to standard output, what is said of it does not.
    stream = sys.stderr if piped else sys.stdout
    if args.format == "json":
        print(json.dumps({"copies": [_plain(one) for one in done]}, indent=2), file=stream)
        return 0
    for one in done:
        _render(one, Console(file=stream))
    return 0


def _render(fixed: Fixed, console: Console) -> None:
    for fix in fixed.fixes:
        rule = RULES[fix.rule]
        line = Text(f"{rule.code} {rule.name}", style="green")
        requests = f"{len(set(fix.sources)):,} requests from {fix.sources[0]}"
        line.append(f" at {fix.place}: {fix.words} ({requests})", style="default")
        line.append(f"; {_saved(fix.saves)}", style="bold")
        console.print(line, highlight=False, soft_wrap=True)
    for left in fixed.left:
        text = f"left as it is: {left.place} ({left.source}): {left.reason}"
        console.print(Text(text, style="yellow"), highlight=False, soft_wrap=True)
    if not fixed.fixes:
        console.print("Nothing to correct.")
    total = fixed.prompt_tokens or 1
    console.print(
        f"{fixed.output}: {fixed.requests:,} requests; {fixed.before / total:.1%} of "
        f"{fixed.prompt_tokens:,} tokens were reusable, {fixed.after:,} would be "
        f"({fixed.after - fixed.before:+,}).",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _saved(tokens: int) -> str:
    return f"saves {tokens:,} tokens" if tokens > 0 else "saves nothing in this traffic"


def _plain(fixed: Fixed) -> dict[str, Any]:
    return {
        "file": str(fixed.path),
        "output": str(fixed.output),
        "requests": fixed.requests,
        "prompt_tokens": fixed.prompt_tokens,
        "reusable_before": fixed.before,
        "reusable_after": fixed.after,
        "changes": [
            {
                "code": RULES[fix.rule].code,
                "rule": fix.rule,
                "place": fix.place,
                "message": fix.words,
                "requests": len(set(fix.sources)),
                "first": fix.sources[0],
                "saves": fix.saves,
            }
            for fix in fixed.fixes
        ],
        "left": [
            {"source": one.source, "place": one.place, "reason": one.reason} for one in fixed.left
        ],
    }
