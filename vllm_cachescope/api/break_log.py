"""The latest breaks of each organisation, for the log, the metrics and ``/cachescope/breaks``."""

import heapq
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry

from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.metrics import BREAKS, LOST_TOKENS
from vllm_cachescope.registration import counter
from vllm_cachescope.tenancy.org_labels import NO_ORG_LABELS, OrgLabels
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account

REMEMBERED_BYTES = 16 * 2**20
"""How much is kept, in bytes of the breaks' JSON. Beyond that the account with most loses its
oldest breaks."""

LISTED_CHANGES = 20
"""How many changes a break lists, the earliest in the prompt."""

LISTED_NAMES = 10
"""How many names a change of a break lists, and how many fields."""

# Operators configure this logger by its name, which moves with no file.
logger = logging.getLogger("vllm.cachescope.breaks")


@dataclass(frozen=True, slots=True)
class Break:
    """A request that could not read from the cache what an earlier request had left there.

    Attributes:
        at: when the request was over, in seconds since the epoch.
        caller: whose request it was.
        model: the model that the request names.
        diagnosis: what happened, with as many changes, names and fields as are listed.
        more_changes: how many changes are not listed.
        more_names: for each listed change, how many of its names and of its fields are not.
        diff: name of the file with what changed, for the operator only; None if there is none.
    """

    at: float
    caller: Caller
    model: str
    diagnosis: Diagnosis
    more_changes: int = 0
    more_names: tuple[tuple[int, int], ...] = ()
    diff: str | None = None

    @classmethod
    def of(
        cls, at: float, caller: Caller, model: str, diagnosis: Diagnosis, diff: str | None
    ) -> "Break":
        """Return a break with as much of ``diagnosis`` as is listed.

        What a client can make long is cut: it may change hundreds of tools in each request, and
        their names may have any length.
        """
        listed = diagnosis.changes[:LISTED_CHANGES]
        cut = (
            replace(c, names=c.names[:LISTED_NAMES], fields=c.fields[:LISTED_NAMES]) for c in listed
        )
        return cls(
            at,
            caller,
            model,
            replace(diagnosis, changes=tuple(cut)),
            len(diagnosis.changes) - len(listed),
            tuple((_unlisted(c.names), _unlisted(c.fields)) for c in listed),
            diff,
        )

    def to_dict(self, for_operator: bool = False, names_replicas: bool = False) -> dict[str, Any]:
        """Return the break as plain data for JSON.

        Args:
            for_operator: whether it is for the operator.
            names_replicas: whether it names other replicas to others, too.
        """
        named = for_operator or names_replicas
        diagnosis = self.diagnosis if named else self.diagnosis.anonymous()
        data = diagnosis.to_dict()
        for change, (names, fields) in zip(data["changes"], self.more_names, strict=True):
            change |= {"more_names": names} if names else {}
            change |= {"more_fields": fields} if fields else {}
        return {
            **({"diff": self.diff} if for_operator and self.diff else {}),
            "at": round(self.at, 3),
            "org": self.caller.org,
            "session": self.caller.session,
            "model": self.model,
            **data,
            **({"more_changes": self.more_changes} if self.more_changes else {}),
        }


class _Kept(NamedTuple):
    """A break that is kept, with its place among all and the length of its JSON."""

    number: int
    seen: Break
    nbytes: int


def _unlisted(names: Sequence[str]) -> int:
    return max(0, len(names) - LISTED_NAMES)


class BreakLog:
    """Keeps, counts and logs breaks. Not thread-safe.

    Args:
        registry: where the counter is registered.
        model_name: the model's name in vLLM's own metrics.
        account_of: returns who answers for an organisation.
        org_labels: the labels of organisations in metrics.
    """

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        model_name: str = "",
        account_of: AccountOf = own_account,
        org_labels: OrgLabels = NO_ORG_LABELS,
    ) -> None:
        self._model_name = model_name
        # By a number that tells which of two came first.
        self._breaks: SharedMemo[int, _Kept] = SharedMemo(
            REMEMBERED_BYTES, attrgetter("nbytes"), account_of
        )
        self._numbers = itertools.count()
        self._org_labels = org_labels
        self._count = counter(BREAKS, registry, org_labels.are_wanted)
        self._lost = counter(LOST_TOKENS, registry, org_labels.are_wanted)

    def add(self, seen: Break, engine: int) -> None:
        """Keep a break, count it and log it.

        Args:
            seen: the break.
            engine: the rank of the engine that ran the request.
        """
        diagnosis, number = seen.diagnosis, next(self._numbers)
        listed = json.dumps(seen.to_dict(for_operator=True), default=str)
        self._breaks.put(seen.caller.org, number, _Kept(number, seen, len(listed)))
        region = diagnosis.where.region if diagnosis.where else "none"
        expected = str(diagnosis.expected).lower()
        labels = self._model_name, str(engine), diagnosis.cause, region, expected
        org = self._org_labels.of(seen.caller.org)
        self._count.labels(*labels, *org).inc()
        self._lost.labels(*labels, *org).inc(diagnosis.lost_tokens)
        level = logging.INFO if diagnosis.expected else logging.WARNING
        logger.log(level, "cache break %s", listed)

    def recent(self, org: str | None, limit: int = 100) -> list[Break]:
        """Return the latest breaks, newest first.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
        """
        latest = heapq.nlargest(limit, self._breaks.of(org), key=attrgetter("number"))
        return [kept.seen for kept in latest]

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the breaks of ``org``, or of one session of ``org``; with None, of everyone."""
        self._breaks.purge(org, lambda _, kept: session in (None, kept.seen.caller.session))
