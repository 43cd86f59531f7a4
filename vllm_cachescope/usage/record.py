"""The record of a finished request: whose it was, and what became of its tokens."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_cachescope.cache.report import Outcome, Report, Row
from vllm_cachescope.tenancy.scope import Scope, short_name

FIVE_MINUTES_S = 300
ONE_HOUR_S = 3600

TTL_CLASSES = ("5m", "1h", "other")
"""The classes of lifetimes that tokens are billed by."""


def ttl_class(ttl_s: int) -> str:
    """Return the one of `TTL_CLASSES` for a lifetime of ``ttl_s`` seconds."""
    return {FIVE_MINUTES_S: "5m", ONE_HOUR_S: "1h"}.get(ttl_s, "other")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A finished request. It holds counts and names, and no text of a prompt or an answer.

    Attributes:
        at: when it was over, in seconds since the epoch.
        org: the organisation's id, as `tenancy.caller` makes it.
        session: the session it named; None if it named none.
        model: the model that it ran on, by the name that the client used.
        replica: the server's name among those that share a ledger.
        engine: rank of the engine that ran it, its first prompt if it had several; None if the
            engine's report was lost, and ``rows`` are an estimate.
        request_id: the response's id; None if no response began.
        rows: the tokens of all of its prompts by outcome, scope and TTL class. They are disjoint,
            and add up to what it adds to ``cachescope_prompt_tokens_total``.
        output_tokens: tokens that the model answered with, over all choices.
        prefill_seconds_saved: seconds that the engine would have taken to compute what was read,
            at the prefill rate that it had measured; None while it has measured none.
        ttft_s: seconds from the engine's taking the prompt to its first token; None if there was
            none.
        lineage: number of the lineage within its session; None if the request was not diagnosed.
        cause: the `Diagnosis.cause`; None if the request was not diagnosed.
        expected: whether what was not read is as it should be; True where nothing is known.
        region: ``tools``, ``system``, ``messages`` and so on of a break; None without one.
        path: where the break is in the client's body, as in ``tools[7]``; None without one.
        missed_tokens: tokens that could have been read but for the break or the cache's loss.
    """

    at: float
    org: str
    session: str | None
    model: str
    replica: str
    engine: int | None
    request_id: str | None
    rows: tuple[Row, ...]
    output_tokens: int = 0
    prefill_seconds_saved: float | None = None
    ttft_s: float | None = None
    lineage: int | None = None
    cause: str | None = None
    expected: bool = True
    region: str | None = None
    path: str | None = None
    missed_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(row.tokens for row in self.rows)

    @property
    def uncached_tokens(self) -> int:
        """Tokens neither read nor created."""
        return sum(row.tokens for row in self.rows if row.outcome == Outcome.UNCACHED)

    @property
    def read_tokens(self) -> int:
        """Tokens read from any tier."""
        return sum(self.read_by_tier.values())

    @property
    def read_by_tier(self) -> dict[str, int]:
        """Tokens read, by the name of the tier: ``device``, ``cpu``, or that of a further tier."""
        return Report(self.rows).read_by_tier

    @property
    def created_by_ttl(self) -> dict[int, int]:
        """Tokens newly cached, by lifetime in seconds."""
        return Report(self.rows).created_by_ttl

    @property
    def created_by_class(self) -> dict[str, int]:
        """Tokens newly cached, by each of `TTL_CLASSES`."""
        return by_class(self.created_by_ttl)

    @property
    def created_tokens(self) -> int:
        """Tokens newly cached, whatever their lifetime."""
        return sum(self.created_by_ttl.values())

    @property
    def is_break(self) -> bool:
        """Whether it is among the breaks: of a change in front of what had been cached, or of a
        loss of the cache's."""
        return self.region is not None or not self.expected

    def diagnosed(
        self,
        lineage: int,
        cause: str,
        expected: bool,
        where: tuple[str, str] | None,
        missed_tokens: int,
    ) -> "RequestRecord":
        """Return the record with what a diagnosis found; ``where`` is the region and the path of
        a break."""
        region, path = where or (None, None)
        return replace(
            self,
            lineage=lineage,
            cause=cause,
            expected=expected,
            region=region,
            path=None if path is None else short_name(path),
            missed_tokens=missed_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON, tokens by outcome."""
        return {
            "at": round(self.at, 3),
            "org": self.org,
            "session": self.session,
            "model": self.model,
            "replica": self.replica,
            "engine": self.engine,
            "request_id": self.request_id,
            "prompt_tokens": self.prompt_tokens,
            "uncached": self.uncached_tokens,
            "created": self.created_by_class,
            "read": self.read_by_tier,
            "output_tokens": self.output_tokens,
            "prefill_seconds_saved": self.prefill_seconds_saved,
            "ttft_s": self.ttft_s,
            "lineage": self.lineage,
            "cause": self.cause,
            "expected": self.expected,
            "region": self.region,
            "path": self.path,
            "missed_tokens": self.missed_tokens,
        }


def by_class(created_by_ttl: Mapping[int, int]) -> dict[str, int]:
    """Return created tokens by each of `TTL_CLASSES`, from those by lifetime in seconds."""
    created = dict.fromkeys(TTL_CLASSES, 0)
    for ttl_s, tokens in created_by_ttl.items():
        created[ttl_class(ttl_s)] += tokens
    return created


def merged_rows(reports: Iterable[Report]) -> tuple[Row, ...]:
    """Return the rows of several prompts' reports as those of one."""
    tokens: Counter[tuple[str, Scope, int]] = Counter()
    for report in reports:
        for row in report.rows:
            tokens[row.outcome, row.scope, row.ttl_s] += row.tokens
    items = tokens.items()
    return tuple(Row(outcome, scope, ttl_s, count) for (outcome, scope, ttl_s), count in items)
