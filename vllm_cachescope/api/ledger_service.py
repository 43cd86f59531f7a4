"""The ledger as one API process uses it: records go in, and queries are answered."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachetools import LRUCache
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from vllm_cachescope.api.usage_endpoint import UsageEndpoint
from vllm_cachescope.config import LedgerSettings
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import LEDGER_RECORDS, NO_ENGINE
from vllm_cachescope.registration import counter
from vllm_cachescope.tenancy.caller import UNLISTED, CallerDirectory
from vllm_cachescope.tenancy.owner_tags import EVERYONE, NOBODY, UNLISTED_TAG, OwnerTags, org_of
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.recent_requests import UnavailableError
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.usage_ledger import UsageLedger

logger = logger_of(__name__)

MAX_ORGS = 20_000
"""How many organisations evictions can be counted for by name: those served last."""

UNKNOWN = "unknown"
"""Whose evictions count where it is not known whose they are."""

_ALWAYS_KNOWN = {org_of(NOBODY): EVERYONE, UNLISTED_TAG: UNLISTED}


class LedgerService:
    """The ledger of one API process.

    Args:
        settings: where it is kept, and for how long.
        prices: what tokens cost.
        directory: the organisations.
        registry: where its counter is registered.
        model_name: the model's name in the server's own metrics.
        replica: the server's name among others.
        secret: key of the owner tags.
        wall_clock: seconds since the epoch.
        shows_replicas: whether organisations see replicas by their names.

    Attributes:
        requests: the recent requests in it.
        keeps_requests: whether it keeps any one by one.

    Raises:
        ConfigError: if the database's address cannot be used.
    """

    def __init__(
        self,
        settings: LedgerSettings,
        prices: Prices,
        directory: CallerDirectory,
        registry: CollectorRegistry,
        model_name: str,
        replica: str = "",
        secret: bytes = b"",
        wall_clock: Callable[[], float] = time.time,
        shows_replicas: bool = False,
    ) -> None:
        records = counter(LEDGER_RECORDS, registry)
        ends = {
            end: records.labels(model_name, NO_ENGINE, end)
            for end in ("written", "dropped", "failed")
        }
        self._ledger = UsageLedger(
            settings, prices, lambda end, number: ends[end].inc(number), directory.account
        )
        self.keeps_requests = settings.max_requests > 0
        self.requests = self._ledger.requests
        self._model_name = model_name
        self._replica = replica
        self._tags = OwnerTags(secret)
        self._wall_clock = wall_clock
        # The organisations that engines may tell of, by their tags.
        self._orgs: LRUCache[bytes, str] = LRUCache(MAX_ORGS)
        self._seen: LRUCache[str, bool] = LRUCache(MAX_ORGS)
        self._endpoint = UsageEndpoint(self._ledger, directory, shows_replicas=shows_replicas)

    def put(self, record: RequestRecord, _diagnosis: Diagnosis | None) -> None:
        """Leave a record to be written. Never blocks."""
        self._meet(record.org)
        self._ledger.put(record)

    def put_evictions(self, counted: Sequence[tuple[str, str, bytes, int]]) -> None:
        """Leave evictions to be written; see `Engines.on_evictions`. Those of an organisation that
        this process has not served lately are `UNKNOWN`'s. Never blocks."""
        for tier, part, tag, entries in counted:
            org = _ALWAYS_KNOWN.get(tag) or self._orgs.get(tag, UNKNOWN)
            self._ledger.evictions.add(
                self._wall_clock(), org, self._model_name, self._replica, tier, part, entries
            )

    def _meet(self, org: str) -> None:
        if org not in self._seen:
            self._seen[org] = True
            self._orgs.update(dict.fromkeys(self._tags.prefixes(org), org))
            # Whether it is listed is not known here.
            self._orgs[self._tags.prefix(org, is_listed=False)] = org

    def purge(self, org: str | None, session: str | None) -> None:
        """Have an organisation's or a session's requests forgotten; see `Store.purge`. Never
        blocks."""
        self._ledger.purge(org, session)

    async def breaks_elsewhere(self, org: str | None, limit: int) -> list[dict[str, Any]]:
        """Return what the ledger has of the newest breaks that other servers had, as plain data;
        nothing if its database does not answer.

        Args:
            org: whose; None for everyone's.
            limit: how many at most.
        """
        if not self.keeps_requests:
            return []
        find = self.requests.breaks_elsewhere
        try:
            found = await asyncio.to_thread(find, self._replica, org, limit)
        except UnavailableError as error:
            logger.debug("The breaks of other replicas cannot be had: %s", error)
            return []
        return [_break_of(one.record) for one in found]

    async def answer(self, fields: Mapping[str, str], caller_org: str | None) -> Response:
        """Answer a query; see `UsageEndpoint.answer`."""
        return await self._endpoint.answer(fields, caller_org)

    def close(self) -> None:
        """Write what is left. A process that ends does so by itself."""
        self._ledger.close()


def _break_of(record: RequestRecord) -> dict[str, Any]:
    """Return a break by its record; where and why are as `Break.to_dict` has them."""
    where = None
    if record.region is not None:
        where = {"region": record.region, "path": record.path}
    return {
        "at": round(record.at, 3),
        "org": record.org,
        "session": record.session,
        "model": record.model,
        "replica": record.replica,
        "request_id": record.request_id,
        "lineage": record.lineage,
        "cause": record.cause,
        "expected": record.expected,
        "where": where,
        "missed_tokens": record.missed_tokens,
    }
