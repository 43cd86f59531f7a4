import json
from importlib.resources import files

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.prompt import plan_hint
from vllm_cachescope.prompt.plan_hint import HintRefused, Refusal
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

KEYS = ScopeKeys(b"k" * 16)
PUBLISHED = json.loads(
    (files("vllm_cachescope.prompt") / "plan_hint.schema.json").read_text(encoding="utf-8")
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
SPAN = st.fixed_dictionaries(
    {
        "end": st.integers(-1, 400) | JSON,
        "scope": st.sampled_from(["global", "org", "session"]) | JSON,
        "ttl_s": st.integers(-1, 4000) | JSON,
    },
    optional={"covered": JSON},
)
PAYLOAD = st.fixed_dictionaries(
    {},
    optional={
        "organisation": st.text(max_size=300) | JSON,
        "session": st.none() | st.text(max_size=300) | JSON,
        "spans": st.none() | st.lists(SPAN, max_size=70) | JSON,
        "tenant": JSON,
    },
)


def test_the_published_schema_is_the_one_in_force():
    assert plan_hint.schema() == PUBLISHED
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)


@given(payload=PAYLOAD | JSON, length=st.integers(1, 400))
def test_what_the_schema_lets_through_becomes_spans_or_is_refused(payload, length):
    # JSON schema counts 1.0 as an integer; what comes over msgpack is one or the other.
    valid = jsonschema.Draft202012Validator(PUBLISHED).is_valid(payload)
    try:
        hint = plan_hint.read("1.0", payload)
    except HintRefused as refused:
        assert refused.reason is Refusal.SCHEMA
        assert not valid or "." in json.dumps(payload)
        return
    assert valid
    if hint.spans is None:
        return
    try:
        spans = hint.spans_of(length, Caller("acme", hint.session), KEYS, "nonce")
    except HintRefused as refused:
        assert refused.reason is Refusal.SPANS
        return
    assert spans[-1].end == length
    assert [span.end for span in spans] == sorted({span.end for span in spans})
    assert [span.scope for span in spans] == sorted(span.scope for span in spans)
    covered = [span.end for span in spans if span.covered]
    assert set(covered) <= {hinted.end for hinted in hint.spans}


@pytest.mark.parametrize("version", ["1.1", "2.0", "", None, 1.0])
def test_another_version_is_refused(version):
    with pytest.raises(HintRefused) as refused:
        plan_hint.read(version, {"organisation": "acme"})
    assert refused.value.reason is Refusal.VERSION


def test_a_session_that_nobody_names_is_private_to_the_prompt():
    payload = {"organisation": "a", "spans": [{"end": 9, "scope": "session", "ttl_s": 300}]}
    (span,) = plan_hint.read("1.0", payload).spans_of(9, Caller("a"), KEYS, "nonce")
    assert (span.scope, span.key, span.covered) == (
        Scope.SESSION,
        KEYS.private_key("nonce"),
        False,
    )
