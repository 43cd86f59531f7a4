"""The ledgers of real servers, next to what their metrics say."""

import time
from collections import Counter
from pathlib import Path

from sqlalchemy import URL, Connection, func, select

from tests.engine.server import Api
from vllm_cachescope.durations import format_duration
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.tables import TOKENS

COUNTED = ("outcome", "scope", "ttl")


def reading(directory: Path) -> Connection:
    return connect(URL.create("sqlite", database=str(directory / "usage.db"))).connect()


def kept_tokens(directory: Path) -> Counter[tuple[str, str, str]]:
    """Return the ledger's tokens by the labels of the metrics."""
    keys = (TOKENS.c.outcome, TOKENS.c.scope, TOKENS.c.ttl_s)
    with reading(directory) as connection:
        found = connection.execute(select(*keys, func.sum(TOKENS.c.tokens)).group_by(*keys))
        return Counter(
            {(o, s, format_duration(ttl) if ttl else "none"): n for o, s, ttl, n in found}
        )


def agreed(api: Api, directory: Path) -> Counter[tuple[str, str, str]]:
    """Return the tokens by the labels of the metrics, as ledger and metrics have them alike."""
    deadline = time.monotonic() + 15
    while True:
        told = +api.metrics("cachescope_prompt_tokens_total", *COUNTED)
        kept = kept_tokens(directory)
        if told == kept or time.monotonic() > deadline:
            assert told == kept
            return kept
        time.sleep(0.2)
