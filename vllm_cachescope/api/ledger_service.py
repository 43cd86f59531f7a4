"""The ledger as one API process uses it: records go in, and queries are answered."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry
from starlette.responses import Response

from vllm_cachescope.api.usage_endpoint import UsageEndpoint
from vllm_cachescope.config import LedgerSettings
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.metrics import TotalCounter
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.recent_requests import RecentRequests
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.usage_ledger import UsageLedger


class LedgerService:
    """The ledger of one API process.

    Args:
        settings: where it is kept, and for how long.
        prices: what tokens cost.
        directory: the organisations.
        registry: where its counter is registered.
        model_name: the model's name in the server's own metrics.

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
    ) -> None:
        records = TotalCounter(
            "cachescope_ledger_records",
            "Records of requests by what became of them: written, dropped (the queue was full: the "
            "database is away or too slow), failed (the database refused them).",
            ("model_name", "outcome"),
            registry=registry,
        )
        ends = {end: records.labels(model_name, end) for end in ("written", "dropped", "failed")}
        self._ledger = UsageLedger(
            settings, prices, lambda end, number: ends[end].inc(number), directory.account
        )
        self.keeps_requests = settings.max_requests > 0
        self.requests: RecentRequests = self._ledger.requests
        self._endpoint = UsageEndpoint(self._ledger, directory)

    def put(self, record: RequestRecord, _diagnosis: Diagnosis | None) -> None:
        """Leave a record to be written. Never blocks."""
        self._ledger.put(record)

    def purge(self, org: str | None, session: str | None) -> None:
        """Have an organisation's or a session's requests forgotten; see `Store.purge`. Never
        blocks."""
        self._ledger.purge(org, session)

    async def answer(self, fields: Mapping[str, str], caller_org: str | None) -> Response:
        """Answer a query; see `UsageEndpoint.answer`."""
        return await self._endpoint.answer(fields, caller_org)

    def close(self) -> None:
        """Write what is left. A process that ends does so by itself."""
        self._ledger.close()
