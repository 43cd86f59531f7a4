"""The endpoint ``GET /cachescope/usage``: what was used, for whoever may know.

Its query: ``since`` and ``until`` (``7d``, ``2026-11-01``, …), ``by`` (``org,model``), ``session``,
``model``, for the operator ``org``; ``format=csv``; ``phases=true`` for phases of use.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from vllm_cachescope.api.answers import Answer, Refused
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.usage.database import describe
from vllm_cachescope.usage.export import to_csv
from vllm_cachescope.usage.period import parse_time
from vllm_cachescope.usage.query import Query
from vllm_cachescope.usage.usage_ledger import UsageLedger

logger = logger_of(__name__)

AT_ONCE = 2
"""How many queries one process has the database answer at a time."""

ANSWER_S = 30.0
"""How long an answer may take, the waiting for other queries included."""

_FIELDS = ("since", "until", "by", "org", "session", "model", "format", "phases")


class UsageEndpoint:
    """Answers queries of the ledger.

    Args:
        ledger: the ledger.
        directory: the organisations.
        wall_clock: seconds since the epoch.
        shows_replicas: whether organisations may split their usage by replica.
    """

    def __init__(
        self,
        ledger: UsageLedger,
        directory: CallerDirectory,
        wall_clock: Callable[[], float] = time.time,
        shows_replicas: bool = False,
    ) -> None:
        self._shows_replicas = shows_replicas
        self._ledger = ledger
        self._directory = directory
        self._wall_clock = wall_clock
        self._threads = ThreadPoolExecutor(AT_ONCE, "cachescope-usage")

    async def answer(self, fields: Mapping[str, str], caller_org: str | None) -> Response:
        """Return the response.

        Args:
            fields: the fields of the request's query.
            caller_org: whose request it is; None for the operator's.

        Raises:
            Refused: if the query is wrong, or not the caller's to ask.
        """
        query, as_csv, as_phases = self._read(fields, caller_org)
        ask = self._ledger.phases if as_phases else self._ledger.answer
        try:
            # Not with Starlette's threads, whose work is waited for even then.
            asked = asyncio.get_running_loop().run_in_executor(self._threads, ask, query)
            found = await asyncio.wait_for(asked, ANSWER_S)
        except ValueError as error:
            raise _bad(str(error)) from None
        except TimeoutError:
            raise Refused(503, "api_error", "the ledger does not answer in time") from None
        except (SQLAlchemyError, OSError) as error:
            logger.warning("The ledger cannot be read: %s", describe(error))
            raise Refused(503, "api_error", "the ledger cannot be read") from None
        if as_csv:
            return Response(to_csv(found), media_type="text/csv; charset=utf-8")
        return Answer(found)

    def _read(self, fields: Mapping[str, str], caller_org: str | None) -> tuple[Query, bool, bool]:
        """Return the query, whether CSV is wanted, and whether phases are.

        Raises:
            Refused: as of `answer`.
        """
        if wrong := fields.keys() - set(_FIELDS):
            raise _bad(f"{min(wrong)}: there is no such field; allowed: {', '.join(_FIELDS)}")
        as_csv = _one_of(fields, "format", {"json": False, "csv": True})
        as_phases = _one_of(fields, "phases", {"false": False, "true": True})
        if as_csv and as_phases:
            raise _bad("format: phases come as JSON only")
        now = self._wall_clock()
        since = _time(fields, "since", "90d" if as_phases else "1d", now)
        until = _time(fields, "until", "now", now)
        if since >= until:
            raise _bad("until: the period ends before it begins")
        try:
            query = Query(
                since,
                until,
                Query.read_by(fields.get("by", "")),
                self._org(fields.get("org"), caller_org),
                fields.get("session"),
                fields.get("model"),
            )
        except ValueError as error:
            raise _bad(str(error)) from None
        if "replica" in query.by and not (caller_org is None or self._shows_replicas):
            raise Refused(403, "permission_error", "by: only the operator may see replicas")
        return query, as_csv, as_phases

    def _org(self, name: str | None, caller_org: str | None) -> str | None:
        """Return the organisation that is asked for; None for all."""
        if name is None:
            return caller_org
        named = self._directory.named(name)
        if caller_org is not None:
            # Whether there is such an organisation is not the caller's to know.
            if caller_org not in named:
                raise Refused(
                    403, "permission_error", f"only the operator may see the usage of {name!r}"
                )
            return caller_org
        if not named:
            raise Refused(404, "not_found_error", f"org: {name!r} is no organisation")
        return named[0]


def _one_of(fields: Mapping[str, str], name: str, values: Mapping[str, bool]) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if value not in values:
        raise _bad(f"{name}: {value!r} is not among {', '.join(values)}")
    return values[value]


def _time(fields: Mapping[str, str], name: str, default: str, now: float) -> float:
    try:
        return parse_time(fields.get(name, default), now)
    except ValueError as error:
        raise _bad(f"{name}: {error}") from None


def _bad(message: str) -> Refused:
    return Refused(400, "invalid_request_error", message)
