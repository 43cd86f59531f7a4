"""A report as JSON: the summary, then every call, written as it is read back."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cachescope.cli.report.recording import Recording


def json_pieces(summary: Mapping[str, Any], recording: Recording) -> Iterator[str]:
    """Yield the pieces of one JSON document: ``summary`` with all of the recording's ``rows``.

    Args:
        summary: as `summary.summarise` returns it.
        recording: the recording.
    """
    yield json.dumps(summary, indent=2)[:-2] + ',\n  "rows": ['
    before = "\n"
    for row in recording.rows():
        yield f"{before}    {json.dumps(row)}"
        before = ",\n"
    yield "\n  ]\n}\n"
