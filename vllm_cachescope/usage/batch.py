"""A batch of records: the rows that they add to the ledger's tables."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic_core import to_json

from vllm_cachescope.cache.report import Row
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.record import RequestRecord

HOUR_S = 3600


class Key(NamedTuple):
    """What sums are kept by; ``session`` is empty for none."""

    hour: int
    org: str
    session: str
    model: str
    replica: str


@dataclass(slots=True)
class Sums:
    """What is counted of the requests of one key, besides their prompts' tokens."""

    requests: int = 0
    breaks: int = 0
    missed_tokens: int = 0
    output_tokens: int = 0
    prefill_seconds_saved: float = 0.0

    def add(self, record: RequestRecord) -> None:
        """Add one request."""
        self.requests += 1
        self.breaks += record.is_break
        self.missed_tokens += record.missed_tokens
        self.output_tokens += record.output_tokens
        self.prefill_seconds_saved += record.prefill_seconds_saved or 0.0


@dataclass(slots=True)
class Batch:
    """The rows of some records.

    Attributes:
        requests: rows of `tables.REQUESTS`.
        tokens: tokens by key, outcome, scope and TTL in seconds.
        sums: what else is counted, by key.
    """

    requests: list[dict[str, Any]] = field(default_factory=list)
    tokens: Counter[tuple[Key, str, str, int]] = field(default_factory=Counter)
    sums: dict[Key, Sums] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[RequestRecord], limits: NameLimits) -> "Batch":
        """Return the rows of ``records``, with as many names as ``limits`` lets through."""
        batch = cls()
        for record in records:
            batch._add(record, limits)
        return batch

    def _add(self, record: RequestRecord, limits: NameLimits) -> None:
        hour = int(record.at) // HOUR_S * HOUR_S
        org, session = limits.admit(
            hour, kept_name(record.org), kept_name(record.session or ""), record.org
        )
        model = limits.admit_model(hour, kept_name(record.model))
        replica = kept_name(record.replica)
        row = request_row(record) | {"account": kept_name(limits.account_of(record.org))}
        self.requests.append(row)
        key = Key(hour, org, session, model, replica)
        for part in record.rows:
            self.tokens[key, part.outcome, part.scope.label, part.ttl_s] += part.tokens
        self.sums.setdefault(key, Sums()).add(record)

    @property
    def token_rows(self) -> list[dict[str, Any]]:
        """Rows of `tables.TOKENS`."""
        return [
            {**key._asdict(), "outcome": outcome, "scope": scope, "ttl_s": ttl_s, "tokens": tokens}
            for (key, outcome, scope, ttl_s), tokens in self.tokens.items()
        ]

    @property
    def usage_rows(self) -> list[dict[str, Any]]:
        """Rows of `tables.USAGE`."""
        return [
            {
                **key._asdict(),
                "requests": sums.requests,
                "breaks": sums.breaks,
                "missed_tokens": sums.missed_tokens,
                "output_tokens": sums.output_tokens,
                "prefill_seconds_saved": sums.prefill_seconds_saved,
            }
            for key, sums in self.sums.items()
        ]


def request_row(record: RequestRecord) -> dict[str, Any]:
    """Return a record as a row of `tables.REQUESTS`."""
    tokens = [[row.outcome, row.scope.label, row.ttl_s, row.tokens] for row in record.rows]
    return {
        "at": record.at,
        "org": kept_name(record.org),
        "session": None if record.session is None else kept_name(record.session),
        "model": kept_name(record.model),
        "replica": kept_name(record.replica),
        "engine": record.engine,
        "request_id": None if record.request_id is None else kept_name(record.request_id),
        "tokens": to_json(tokens).decode(),
        "output_tokens": record.output_tokens,
        "prefill_seconds_saved": record.prefill_seconds_saved,
        "ttft_s": record.ttft_s,
        "lineage": record.lineage,
        "cause": record.cause,
        "expected": record.expected,
        "region": record.region,
        "path": None if record.path is None else kept_name(record.path),
        "missed_tokens": record.missed_tokens,
    }


def record_of(row: Any) -> RequestRecord:
    """Return the record that `request_row` made a row of."""
    tokens = json.loads(row.tokens)
    return RequestRecord(
        at=row.at,
        org=row.org,
        session=row.session,
        model=row.model,
        replica=row.replica,
        engine=row.engine,
        request_id=row.request_id,
        rows=tuple(
            Row(outcome, Scope.parse(scope), ttl_s, count)
            for outcome, scope, ttl_s, count in tokens
        ),
        output_tokens=row.output_tokens,
        prefill_seconds_saved=row.prefill_seconds_saved,
        ttft_s=row.ttft_s,
        lineage=row.lineage,
        cause=row.cause,
        expected=bool(row.expected),
        region=row.region,
        path=row.path,
        missed_tokens=row.missed_tokens,
    )
