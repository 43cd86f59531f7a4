"""Corrects recorded requests: which fixes there are, and what each would have saved."""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_cachescope.cli.explaining import explain
from vllm_cachescope.cli.explanation import Explanation
from vllm_cachescope.cli.fixes.breakpoint_places import breakpoint_fixes
from vllm_cachescope.cli.fixes.fix import Fix, LeftAsIs
from vllm_cachescope.cli.fixes.key_order import call_fixes, tool_fixes
from vllm_cachescope.cli.fixes.sent_body import SentBody
from vllm_cachescope.cli.fixes.tool_order import tool_order_fixes
from vllm_cachescope.cli.fixes.volatile_lines import volatile_fixes
from vllm_cachescope.cli.traffic import STANDARD_INPUT, Call, LeftOut, TrafficError, converse
from vllm_cachescope.cli.traffic.bodies import NoRequestError, body_call
from vllm_cachescope.cli.traffic.envelope import envelope_of
from vllm_cachescope.cli.traffic.protocols import protocol_of
from vllm_cachescope.cli.traffic.records import read_records

_MEASURED = 12  # fixes that are measured one by one


class FixError(ValueError):
    """A file that cannot be corrected, or a copy that cannot be written."""


@dataclass(slots=True)
class Fixed:
    """A corrected copy.

    Attributes:
        path: the file it was made of.
        output: where it was written.
        requests: how many requests it holds.
        fixes: what was corrected.
        left: what was seen and left as it is.
        prompt_tokens: tokens of all prompts, before.
        before: how many of them were reusable before.
        after: how many are now.
    """

    path: Path
    output: Path
    requests: int = 0
    fixes: list[Fix] = field(default_factory=list)
    left: list[LeftAsIs] = field(default_factory=list)
    prompt_tokens: int = 0
    before: int = 0
    after: int = 0


def fix_files(paths: list[Path], output: str | None, in_place: bool) -> Iterator[Fixed]:
    """Write a corrected copy of each file, and yield what was done.

    Args:
        paths: the files.
        output: where to write the copy of a single file; None for beside each file.
        in_place: whether each file is replaced by its copy.

    Raises:
        OSError: if a file cannot be read or written.
        FixError: if a file holds nothing that could be sent again, or would be overwritten.
    """
    if output is not None and (len(paths) > 1 or in_place):
        raise FixError("--output is for one file, and not together with --in-place")
    for path in paths:
        if in_place:
            target = path
        else:
            target = Path(output) if output is not None else _beside(path)
            if target != STANDARD_INPUT and target.resolve() == path.resolve():
                raise FixError(f"{target}: would overwrite the recording; --in-place allows that")
        yield _fix_file(path, target)


def _beside(path: Path) -> Path:
    if path == STANDARD_INPUT:
        return STANDARD_INPUT
    packed = ".gz" if path.suffix == ".gz" else ""
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    return path.with_name(f"{name}.fixed.jsonl{packed}")


def _fix_file(path: Path, output: Path) -> Fixed:
    records: list[Any] = []
    bodies: list[SentBody] = []
    left_out: list[LeftOut] = []
    for source, record in read_records(path, left_out):
        records.append(record)
        if isinstance(record, dict) and (body := _sent_body(source, record)) is not None:
            bodies.append(body)
    if not bodies:
        raise FixError(
            f"{path}: holds no request bodies as they were sent, by themselves or in envelopes"
        )
    if all(body.envelope.at is not None for body in bodies):
        bodies.sort(key=lambda body: body.envelope.at or 0.0)
    fixed = Fixed(path, output, len(bodies))
    _apply(bodies, fixed)
    _write(records, output)
    return fixed


def _sent_body(source: str, record: dict[str, Any]) -> SentBody | None:
    envelope = envelope_of(record)
    body = envelope.body
    if not isinstance(body, dict):
        return None
    for key in ("body", "request_body"):
        if isinstance(record.get(key), str):
            record[key] = body  # It was JSON in a string; an object is read the same.
    if converse.is_body(body):
        return SentBody(body, None, source, envelope)
    try:
        return SentBody(body, protocol_of(body, envelope.path), source, envelope)
    except ValueError:
        return None


def _apply(bodies: list[SentBody], fixed: Fixed) -> None:
    """Make all corrections, and measure what they would have saved, one after the other."""
    explanation = _explained(bodies)
    fixed.prompt_tokens, fixed.before = explanation.prompt_tokens, explanation.reusable_tokens
    reusable = fixed.before
    for plan in (tool_fixes, tool_order_fixes, call_fixes, breakpoint_fixes, _volatile(fixed)):
        for fix in plan(bodies):
            fix.apply()
            fixed.fixes.append(fix)
            if len(fixed.fixes) <= _MEASURED:
                now = _explained(bodies).reusable_tokens
                fix.saves, reusable = now - reusable, now
    fixed.after = _explained(bodies).reusable_tokens if fixed.fixes else reusable


def _volatile(fixed: Fixed) -> Any:
    def plan(bodies: list[SentBody]) -> list[Fix]:
        fixes, fixed.left = volatile_fixes(bodies)
        return fixes

    return plan


def _explained(bodies: list[SentBody]) -> Explanation:
    calls: list[Call] = []
    for body in bodies:
        try:
            # What a response counted was of the prompt as it was.
            envelope = replace(body.envelope, usage=None)
            if (call := body_call(body.source, envelope)) is not None:
                calls.append(call)
        except (NoRequestError, TrafficError):
            continue  # The server refuses it.
    return Explanation(list(explain(calls, text=False)))


def _write(records: list[Any], output: Path) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = "".join(lines).encode("utf-8", "surrogateescape")
    if output == STANDARD_INPUT:
        sys.stdout.buffer.write(data)
        return
    if output.suffix == ".gz":
        data = gzip.compress(data)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, output)
