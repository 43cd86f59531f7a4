"""`decode` and `encode` agree with `json`, which the server reads bodies with."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.wire.body import decode, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(values)
def test_both_ways_are_those_of_json(value: object) -> None:
    raw = json.dumps(value).encode()
    assert repr(decode(raw)) == repr(json.loads(raw))
    assert repr(json.loads(encode(value))) == repr(json.loads(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"half": "\\ud800"}',
        b"[NaN, Infinity, -Infinity, 1e400, -0.0, 123456789012345678901234567890]",
        b'{"twice": 1, "twice": 2}',
        b"[" * 500 + b"]" * 500,
        b"\xef\xbb\xbf{}",
        '{"a": "b"}'.encode("utf-16"),
    ],
)
def test_what_only_json_takes(raw: bytes) -> None:
    value = decode(raw)
    assert value is not None
    assert repr(value) == repr(json.loads(raw))
    assert repr(json.loads(encode(value))) == repr(value)


@pytest.mark.parametrize("raw", [b"", b"[1,]", b'"\x01"', b'["\xff"]', b"[" * 100_000])
def test_what_is_not_json(raw: bytes) -> None:
    assert decode(raw) is None
