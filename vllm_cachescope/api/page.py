"""The page at ``/cachescope``: its files, its data, and who may see which of it.

==================================  =============================================================
``GET /cachescope``                 the page itself, for anyone: it holds no data
``GET /cachescope/page/FILE``       what it is made of
``GET /cachescope/requests``        recent requests, newest first, since a cursor: those of the
                                    caller's organisation, everyone's for the operator
``GET /cachescope/request``         why one of them was read as far as it was
``GET /cachescope/diff``            what changed in it, in words of the prompt: for the operator
==================================  =============================================================
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.responses import Response

from vllm_cachescope.api.answers import Answer, Refused
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.page_files import HEADERS, PageFiles
from vllm_cachescope.api.peers import ALONE, Peers
from vllm_cachescope.api.request_details import RequestDetails
from vllm_cachescope.api.viewer import Viewer
from vllm_cachescope.cache.report import Outcome
from vllm_cachescope.logs import logger_of
from vllm_cachescope.usage.prices import Multipliers, Prices, cost_with, cost_without
from vllm_cachescope.usage.recent_requests import Numbered, RecentRequests, UnavailableError
from vllm_cachescope.usage.record import by_class

logger = logger_of(__name__)

MOST = 500
"""How many requests one answer lists at most: some 10 ms of work."""

REQUESTS = "/cachescope/requests"

_PATH = re.compile(r"(?:^|/)cachescope(?:/|/(requests|request|diff)|/page/([a-z_]+\.[a-z]+))?$")

_BASE = Multipliers()


def is_page_path(path: str) -> bool:
    """Tell whether a path is one of the page's, wherever the server is mounted."""
    return _PATH.search(path) is not None


class Page:
    """Answers requests for the page and its data.

    Args:
        requests: the recent requests.
        details: what is known of them besides.
        diffs: the diffs of what changed; None where they are off.
        model_name: the model's name in the server's own metrics.
        prices: what tokens cost, if that is known.
        peers: the API processes of the server, of which this is one.
        wall_clock: seconds since the epoch.
        shows_replicas: whether organisations see replicas by their names.

    Attributes:
        details: what is known of requests besides their records.
    """

    def __init__(
        self,
        requests: RecentRequests,
        details: RequestDetails,
        diffs: Diffs | None,
        model_name: str,
        prices: Prices | None = None,
        peers: Peers = ALONE,
        wall_clock: Callable[[], float] = time.time,
        shows_replicas: bool = False,
    ) -> None:
        self._shows_replicas = shows_replicas
        self._requests = requests
        self.details = details
        self._diffs = diffs
        self._model_name = model_name
        self._prices = prices or Prices()
        self._peers = peers
        self._wall_clock = wall_clock
        self._files = PageFiles()

    async def answer(
        self,
        method: str,
        path: str,
        query: QueryParams,
        headers: Mapping[str, str],
        viewer: Callable[[], Viewer],
    ) -> Response:
        """Return the response to a request.

        Args:
            method: its method.
            path: its path, one of the page's.
            query: its query.
            headers: its headers, names in lower case.
            viewer: returns who looks; raises `Refused` for someone whom the server does not know.
        """
        found = _PATH.search(path)
        assert found is not None
        data, file = found.groups()
        try:
            if method not in ("GET", "HEAD"):
                message = "use GET"
                raise Refused(405, "invalid_request_error", message, {"allow": "GET, HEAD"})
            if data is None:
                return self._files.answer(path, file, headers)
            if data == "requests":
                answer = await run_in_threadpool(self._listed, viewer(), query)
            elif data == "request":
                answer = self._detailed(viewer(), query)
            else:
                answer = await run_in_threadpool(self._diff, viewer(), query)
        except Refused as refused:
            answer = refused.answer()
        answer.headers.update(HEADERS)
        return answer

    def _listed(self, viewer: Viewer, query: QueryParams) -> Answer:
        name = self._requests.name
        after, before = _cursor(query, "after", name), _cursor(query, "before", name)
        limit = _number(query.get("limit"), "limit", MOST, 1, MOST)
        try:
            found = self._requests.newest(viewer.org, limit + 1, after or 0, before)
        except UnavailableError as error:
            logger.debug("The requests cannot be had: %s", error)
            raise Refused(503, "api_error", "the ledger's database does not answer") from None
        named = viewer.is_operator or self._shows_replicas
        listed = [self._shown(one, named) for one in found[:limit]]
        return Answer(
            {
                "viewer": {"org": viewer.org, "is_operator": viewer.is_operator},
                "model": self._model_name,
                "now": round(self._wall_clock(), 3),
                "currency": self._prices.currency if self._prices.models else None,
                # Where this list goes on: `after` NEWEST there is what is new, `before` OLDEST what
                # is older, if there is any.
                "list": name,
                "newest": found[0].number if found else (after or 0),
                "oldest": found[limit - 1].number if len(found) > limit else None,
                "requests": listed,
            }
            | self._peers.to_dict()
        )

    def _shown(self, one: Numbered, names_replica: bool) -> dict[str, Any]:
        """Return a request as data for JSON, without what is nothing. In one pass over its rows:
        an answer has hundreds of requests."""
        record, uncached = one.record, 0
        read: Counter[str] = Counter()
        created: Counter[int] = Counter()
        for row in record.rows:
            if row.outcome == Outcome.CREATED:
                created[row.ttl_s] += row.tokens
            elif row.outcome == Outcome.UNCACHED:
                uncached += row.tokens
            else:
                read[row.outcome.removeprefix("read_")] += row.tokens
        price, all_read = self._prices.of(record.model), sum(read.values())
        multipliers = price.multipliers if price else _BASE
        data = {
            "number": one.number,
            "at": round(record.at, 3),
            "org": record.org,
            "session": record.session,
            "model": record.model,
            "replica": (record.replica or None) if names_replica else None,
            "engine": record.engine,
            "request_id": record.request_id,
            "lineage": record.lineage,
            "uncached": uncached or None,
            "created": by_class(created) if created else None,
            "read": read or None,
            "output_tokens": record.output_tokens or None,
            "prefill_seconds_saved": record.prefill_seconds_saved,
            "ttft_s": record.ttft_s,
            "cause": record.cause,
            "expected": None if record.expected else False,
            "region": record.region,
            "path": record.path,
            "missed_tokens": record.missed_tokens or None,
            "equivalents": round(multipliers.equivalents(uncached, all_read, created), 2),
        }
        if price is not None:
            prompt = uncached + all_read + created.total()
            data["cost_without"] = cost_without(price, prompt)
            data["cost_with"] = cost_with(price, uncached, all_read, created)
        return {key: value for key, value in data.items() if value is not None}

    def _detailed(self, viewer: Viewer, query: QueryParams) -> Answer:
        at_ms = _number(query.get("at"), "at", 0, 0, 2**53)
        found = self.details.find(viewer.org, query.get("id", ""), at_ms / 1000)
        shown = None if found is None else found.to_dict(viewer.is_operator, self._shows_replicas)
        return Answer({"details": shown})

    def _diff(self, viewer: Viewer, query: QueryParams) -> Answer:
        if not viewer.is_operator:
            raise Refused(403, "permission_error", "diffs are for the operator")
        text = self._diffs and self._diffs.read(query.get("name", ""))
        if text is None:
            raise Refused(404, "not_found_error", "there is no such diff, or not any more")
        return Answer({"diff": text})


def _cursor(query: QueryParams, key: str, name: str) -> int | None:
    """Return the number that the cursor ``key`` has for the list called ``name``; None if it is a
    cursor of other lists, or there is none.

    Raises:
        Refused: if it is none.
    """
    for part in query.get(key, "").split(",")[:64]:
        listed, _, number = part.partition(".")
        if listed == name:
            return _number(number, key, 0, 0, 2**53)
    return None


def _number(text: str | None, key: str, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    # Not `isdigit`, which knows digits that `int` does not.
    if not re.fullmatch(r"[0-9]{1,16}", text) or not least <= int(text) <= most:
        message = f"{key}: a whole number from {least} to {most} is wanted"
        raise Refused(400, "invalid_request_error", message)
    return int(text)
