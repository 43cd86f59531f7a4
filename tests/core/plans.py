"""Plans for tests: one that is written down, and random ones."""

from hypothesis import strategies as st

from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.tenancy.scope import Scope

PLAN = Plan(
    (
        Span(100, Scope.GLOBAL, "g", 3600),
        Span(300, Scope.ORG, "o", 300),
        Span(350, Scope.SESSION, "s", 300, covered=False),
    ),
    "nonce",
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    ends = sorted(draw(st.sets(st.integers(1, 2000), min_size=1, max_size=6)))
    scopes = sorted(draw(st.lists(st.sampled_from(Scope), min_size=len(ends), max_size=len(ends))))
    spans = [
        Span(end, scope, f"{scope.label}-{i}", draw(st.integers(1, 9999)), draw(st.booleans()))
        for i, (end, scope) in enumerate(zip(ends, scopes, strict=True))
    ]
    nonce = draw(st.text(min_size=1, max_size=8))
    return Plan(tuple(spans), nonce, draw(st.binary(min_size=16, max_size=16)))
