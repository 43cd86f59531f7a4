"""Exports of usage: flat rows for tables of other programs, as CSV or Parquet."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_cachescope.usage.record import TTL_CLASSES

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet take a text for a formula; clients choose the names of sessions."""


_FLOATS = (
    "hit_rate",
    "fresh_share",
    "reads_per_write",
    "reads_per_fresh",
    "prefill_seconds_saved",
    "cost_without",
    "cost_with",
    "saved_share",
    "cost_of_output",
)


def flat_rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an answer with one value a column, the same columns in each.

    Args:
        answer: what `usage_ledger.usage_of` returned. Without rows by anything, the total is the
            one row.
    """
    rows: Sequence[Mapping[str, Any]] = answer["rows"] if answer["by"] else [answer["total"]]
    tiers = sorted({tier for row in rows for tier in row["read"]})
    return [_flat(row, tiers, answer["currency"]) for row in rows]


def to_csv(answer: Mapping[str, Any]) -> str:
    """Return an answer as CSV with a line of names; a value that is not known is empty."""
    rows = flat_rows(answer)
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def to_parquet(answer: Mapping[str, Any], path: Path) -> None:
    """Write an answer to a Parquet file.

    Raises:
        ImportError: if pyarrow is not installed.
        OSError: if the file cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    rows = flat_rows(answer)
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema(
        [(name, types[_kind(answer, name)]) for name in (rows[0] if rows else {})]
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def _kind(answer: Mapping[str, Any], name: str) -> type:
    """Return the type of a column, also where no row has a value in it."""
    if name in answer["by"] or name == "currency":
        return str
    return float if name in _FLOATS else int


def _flat(row: Mapping[str, Any], tiers: Sequence[str], currency: str | None) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "created":
            flat |= {f"created_{ttl}": value[ttl] for ttl in TTL_CLASSES}
        elif name == "read":
            flat |= {f"read_{tier}": value.get(tier, 0) for tier in tiers}
        else:
            flat[name] = value
    return flat | {"currency": currency}


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value
