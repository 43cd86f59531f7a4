"""The latest breaks of each organisation, for the log, the metrics and ``/cachescope/breaks``."""

import heapq
import itertools
import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from cachetools import FIFOCache
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.tenancy.scope import Caller

REMEMBERED_BREAKS = 100
"""How many breaks of one organisation are kept, the latest."""

REMEMBERED_ORGS = 100
"""How many organisations breaks are kept of: those that had a break last."""

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

    def to_dict(self, for_operator: bool = False) -> dict[str, Any]:
        """Return the break as plain data for JSON."""
        data = self.diagnosis.to_dict()
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


def _unlisted(names: Sequence[str]) -> int:
    return max(0, len(names) - LISTED_NAMES)


class BreakLog:
    """Keeps, counts and logs breaks. Not thread-safe.

    Args:
        registry: where the counter is registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        # By organisation, with a number each that tells which of two came first.
        self._breaks: FIFOCache[str, deque[tuple[int, Break]]] = FIFOCache(REMEMBERED_ORGS)
        self._numbers = itertools.count()
        self._count = Counter(
            "cachescope_breaks",
            "Requests that could not read from the cache as far as an earlier request of their "
            "session would have let them, by cause and by the region of the prompt that changed.",
            ("cause", "region", "expected"),
            registry=registry,
        )

    def add(self, seen: Break) -> None:
        """Keep a break, count it and log it."""
        org, diagnosis = seen.caller.org, seen.diagnosis
        known = self._breaks.get(org) or deque(maxlen=REMEMBERED_BREAKS)
        known.append((next(self._numbers), seen))
        self._breaks[org] = known  # Puts the organisation last among those to be dropped.
        region = diagnosis.where.region if diagnosis.where else "none"
        self._count.labels(diagnosis.cause, region, str(diagnosis.expected).lower()).inc()
        level = logging.INFO if diagnosis.expected else logging.WARNING
        logger.log(
            level, "cache break %s", json.dumps(seen.to_dict(for_operator=True), default=str)
        )

    def recent(self, org: str | None, limit: int = 100) -> list[Break]:
        """Return the latest breaks, newest first.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
        """
        of = self._breaks.values() if org is None else (self._breaks.get(org, ()),)
        latest = heapq.nlargest(limit, itertools.chain.from_iterable(of), key=itemgetter(0))
        return [seen for _, seen in latest]

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop the breaks of ``org``, or of one session of ``org``; with None, of everyone."""
        for one in [org] if org is not None else list(self._breaks):
            known = self._breaks.get(one)
            if known is None:
                continue
            others = [b for b in known if session is not None and b[1].caller.session != session]
            known.clear()
            known.extend(others)
            if not others:
                del self._breaks[one]
