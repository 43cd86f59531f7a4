"""The page of a report: one file with its data, and the timeline of the page of a server."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_cachescope.cli.report.recording import Recording

MOST_CALLS = 20_000
"""Calls that a page draws, at most: those of the sessions with the most tokens."""

_OWN = resources.files("vllm_cachescope") / "cli" / "report" / "assets"
_SHARED = resources.files("vllm_cachescope") / "api" / "page_assets"
_IMPORT = re.compile(r'\bfrom "\./([a-z_]+)\.js"')
_START = 'import "report";'


def write_page(path: Path, summary: Mapping[str, Any], recording: Recording) -> None:
    """Write the page of a report. It asks for nothing outside of itself.

    Args:
        path: the file.
        summary: as `summary.summarise` returns it.
        recording: the recording.

    Raises:
        OSError: if the file cannot be written.
    """
    importmap = _importmap()
    fields = {
        "policy": _policy(importmap),
        "style": "\n".join(
            (folder / name).read_text(encoding="utf-8")
            for folder, name in ((_SHARED, "page.css"), (_OWN, "report.css"))
        ),
        "importmap": importmap,
        "start": _START,
    }
    page = (_OWN / "report.html").read_text(encoding="utf-8")
    for name, value in fields.items():
        page = page.replace(f"{{{name}}}", value)
    before, _, after = page.partition("{data}")
    with path.open("w", encoding="utf-8") as file:
        file.write(before)
        for piece in _data(summary, recording):
            # No text in the data can end the element that holds it.
            file.write(piece.replace("<", "\\u003c"))
        file.write(after)


def _importmap() -> str:
    """Return an import map with all modules in it: a page that is a file may load no other one."""
    imports: dict[str, str] = {}
    left = ["report"]
    while left:
        name = left.pop()
        if name in imports:
            continue
        own = _OWN / f"{name}.js"
        file = own if own.is_file() else _SHARED / f"{name}.js"
        text = file.read_text(encoding="utf-8")
        left += _IMPORT.findall(text)
        packed = base64.b64encode(_IMPORT.sub(r'from "\1"', text).encode()).decode()
        imports[name] = f"data:text/javascript;base64,{packed}"
    return json.dumps({"imports": imports})


def _policy(importmap: str) -> str:
    """Return a policy under which nothing runs or is loaded but what is here."""
    hashes = (
        base64.b64encode(sha256(text.encode()).digest()).decode() for text in (importmap, _START)
    )
    own = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {own} data:; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(summary: Mapping[str, Any], recording: Recording) -> Iterator[str]:
    """Yield the pieces of the page's data: the summary, the drawn calls, the sessions' names."""
    drawn: dict[int, str] = {}
    left = MOST_CALLS
    for session in sorted(recording.sessions.values(), key=lambda one: -one.tokens):
        if left <= 0:
            break
        drawn[session.number] = session.name
        left -= len(session)
    yield f'{{"summary": {json.dumps(summary)}, "rows": ['
    before, left = "", MOST_CALLS
    for row in recording.rows():
        if left and row["session_number"] in drawn:
            yield before + json.dumps(_request(row))
            before, left = ",\n", left - 1
    yield f'], "names": {json.dumps(drawn)}}}'


def _request(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call as the page of a server lists requests."""
    request = {
        "number": row["number"],
        "request_id": row["source"],
        "at": row["at"],
        "org": "",
        "session": row["session_number"],
        "lineage": row["lineage"],
        "model": row["model"],
        "read": {"cache": row["read"]},
        "created": row["created"],
        "uncached": row["uncached"],
        "shared": row["shared"],
        "cause": row["cause"],
    }
    if row["break"]:
        request |= {
            "region": row["region"] or "cache",
            "path": row["path"],
            "expected": row["expected"],
            "missed_tokens": row["missed"],
            "changes": row["changes"],
            "suggestion": row["suggestion"],
        }
    return request
