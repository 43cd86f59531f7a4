import json
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.cache.report import Report, Row
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.usage.record import RequestRecord, merged_rows

ROWS = st.lists(
    st.builds(
        Row,
        st.sampled_from(["read_device", "read_cpu", "read_redis", "created", "uncached"]),
        st.sampled_from(Scope),
        st.sampled_from([60, 300, 3600, 86400]),
        st.integers(1, 10**6),
    )
)


def record(rows: tuple[Row, ...]) -> RequestRecord:
    return RequestRecord(1.0, "anonymous", None, "toy", "a", 0, "chatcmpl-1", rows)


@given(ROWS, ROWS)
def test_counts_are_disjoint_and_add_up(first: list[Row], second: list[Row]) -> None:
    rows = merged_rows([Report(tuple(first)), Report(tuple(second))])
    assert len({(row.outcome, row.scope, row.ttl_s) for row in rows}) == len(rows)
    made = record(rows)
    assert made.prompt_tokens == sum(row.tokens for row in first + second)
    assert made.prompt_tokens == made.uncached_tokens + made.read_tokens + made.created_tokens
    assert sum(made.created_by_class.values()) == made.created_tokens


def test_created_by_class() -> None:
    rows = tuple(
        Row("created", Scope.ORG, ttl_s, tokens)
        for ttl_s, tokens in ((60, 1), (300, 2), (1800, 4), (3600, 8))
    )
    assert record(rows).created_by_class == {"5m": 2, "1h": 8, "other": 5}


def test_plain_data() -> None:
    made = record((Row("read_cpu", Scope.SESSION, 300, 7), Row("uncached", Scope.ORG, 0, 5)))
    data = json.loads(json.dumps(made.to_dict()))
    assert (data["prompt_tokens"], data["uncached"], data["read"]) == (12, 5, {"cpu": 7})
    assert data.keys() >= asdict(made).keys() - {"rows"}
