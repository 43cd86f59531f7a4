from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.prompt.request import Mark, Part, PromptRequest, Protocol, Region
from vllm_cachescope.prompt.segments import RegionDefault, Segment, segments
from vllm_cachescope.tenancy.scope import Scope

GLOBAL, ORG, SESSION = Scope.GLOBAL, Scope.ORG, Scope.SESSION
ALL_ORG = {region: RegionDefault(ORG, 300) for region in Region}
NARROWING = {
    Region.TOOLS: RegionDefault(GLOBAL, 3600),
    Region.SYSTEM: RegionDefault(ORG, 1800),
    Region.MESSAGES: RegionDefault(SESSION, 300),
}


def part(name: str, mark: Mark | None = None) -> Part:
    """A part called as its region and a number: t0, s1, m2."""
    region = {"t": Region.TOOLS, "s": Region.SYSTEM, "m": Region.MESSAGES}[name[0]]
    return Part(region, name, name, mark=mark)


def mark(ttl_s: int | None = None, scope: Scope | None = None) -> Mark:
    return Mark("p", ttl_s, scope)


def request(*parts: Part, automatic: bool | None = None, ttl_s: int | None = None) -> PromptRequest:
    if automatic is None:
        automatic = not any(part.mark for part in parts)
    return PromptRequest(Protocol.MESSAGES, "m", parts, automatic=automatic, ttl_s=ttl_s)


Row = tuple[str | None, Scope, int, bool]


def rows(plan: tuple[Segment, ...]) -> list[Row]:
    return [(s.after.path if s.after else None, s.scope, s.ttl_s, s.covered) for s in plan]


T, S, M = part("t0"), part("s0"), part("m0")


@pytest.mark.parametrize(
    ("asked", "defaults", "plan"),
    [
        # Automatic: each region as the operator says, kept as long as what follows it.
        (request(T, S, M), ALL_ORG, [(None, ORG, 300, True)]),
        (
            request(T, S, M),
            NARROWING,
            [("t0", GLOBAL, 3600, True), ("s0", ORG, 1800, True), (None, SESSION, 300, True)],
        ),
        (
            request(T, M),
            {
                Region.TOOLS: RegionDefault(GLOBAL, 60),
                Region.SYSTEM: RegionDefault(GLOBAL, 86400),
                Region.MESSAGES: RegionDefault(SESSION, 300),
            },
            [("t0", GLOBAL, 300, True), (None, SESSION, 300, True)],
        ),
        (
            request(T, S, M, ttl_s=60),
            NARROWING,
            [("t0", GLOBAL, 60, True), ("s0", ORG, 60, True), (None, SESSION, 60, True)],
        ),
        # A default never widens again.
        (
            request(T, S, M),
            {**NARROWING, Region.TOOLS: RegionDefault(SESSION, 300)},
            [("s0", SESSION, 1800, True), (None, SESSION, 300, True)],
        ),
        # Nothing is to be kept: an explicit mode without breakpoints.
        (request(T, M, automatic=False), ALL_ORG, [(None, ORG, 300, False)]),
        # A breakpoint on the very last part leaves no tail.
        (request(T, S, part("m0", mark())), ALL_ORG, [(None, ORG, 300, True)]),
        # The tail after the last breakpoint is not covered.
        (
            request(T, part("s0", mark(3600)), M),
            ALL_ORG,
            [("s0", ORG, 3600, True), (None, ORG, 300, False)],
        ),
        # The tail may begin inside a region, and has each region's own defaults.
        (
            request(part("t0", mark()), part("t1"), S, M),
            NARROWING,
            [
                ("t0", GLOBAL, 3600, True),
                ("t1", GLOBAL, 3600, False),
                ("s0", ORG, 1800, False),
                (None, SESSION, 300, False),
            ],
        ),
        # TtlReplay: the longest at or after; a bare mark has its region's default.
        (
            request(part("t0", mark(60)), part("s0", mark()), part("m0", mark(600))),
            NARROWING,
            [("t0", GLOBAL, 1800, True), ("s0", ORG, 1800, True), (None, SESSION, 600, True)],
        ),
        (
            request(part("t0", mark(3600)), part("m0", mark(300)), part("m1", mark(300))),
            ALL_ORG,
            [("t0", ORG, 3600, True), (None, ORG, 300, True)],
        ),
        # The request's own lifetime stands in for the default, not for what a mark says.
        (
            request(part("t0", mark(3600)), part("m0", mark()), part("m1"), ttl_s=60),
            NARROWING,
            [("t0", GLOBAL, 3600, True), ("m0", SESSION, 60, True), (None, SESSION, 60, False)],
        ),
        # A wide explicit scope widens the narrower defaults before it.
        (
            request(T, part("s0", mark(scope=GLOBAL)), M),
            ALL_ORG,
            [("s0", GLOBAL, 300, True), (None, ORG, 300, False)],
        ),
        # It does not narrow the wider defaults before it, but all those after it.
        (
            request(T, part("s0", mark(scope=SESSION)), M),
            {region: RegionDefault(GLOBAL, 300) for region in Region},
            [("t0", GLOBAL, 300, True), ("s0", SESSION, 300, True), (None, SESSION, 300, False)],
        ),
        # An unscoped mark between two scoped ones stays between them.
        (
            request(
                part("t0", mark(scope=GLOBAL)),
                part("s0", mark()),
                part("m0", mark(scope=ORG)),
            ),
            {region: RegionDefault(SESSION, 300) for region in Region},
            [("t0", GLOBAL, 300, True), (None, ORG, 300, True)],
        ),
        # Automatic with marks of its own (OpenAI's implicit mode): covered to the end.
        (
            request(T, part("m0", mark(3600)), part("m1"), automatic=True),
            ALL_ORG,
            [("m0", ORG, 3600, True), (None, ORG, 300, True)],
        ),
        # No parts at all: what the template makes of nothing.
        (request(), NARROWING, [(None, SESSION, 300, True)]),
        (request(ttl_s=60, automatic=False), NARROWING, [(None, SESSION, 60, False)]),
    ],
)
def test_plans(
    asked: PromptRequest, defaults: dict[Region, RegionDefault], plan: list[Row]
) -> None:
    assert rows(segments(asked, defaults)) == plan


scopes = st.sampled_from(Scope)
ttls = st.sampled_from([60, 300, 3600])
any_defaults = st.fixed_dictionaries(
    {region: st.builds(RegionDefault, scopes, ttls) for region in Region}
)


@st.composite
def any_request(draw: st.DrawFn) -> PromptRequest:
    """Explicit scopes only narrow, as the readers make sure; all else is free."""
    names = sorted(draw(st.lists(st.sampled_from("tsm"), max_size=8)), key="tsm".index)
    marked = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    explicit = sorted(draw(st.lists(scopes, min_size=sum(marked), max_size=sum(marked))))
    parts = []
    for i, (name, is_marked) in enumerate(zip(names, marked, strict=True)):
        here = None
        if is_marked:
            scope = explicit.pop(0)
            here = mark(draw(st.none() | ttls), scope if draw(st.booleans()) else None)
        parts.append(part(f"{name}{i}", here))
    return request(*parts, automatic=draw(st.booleans()), ttl_s=draw(st.none() | ttls))


def spread(asked: PromptRequest, plan: tuple[Segment, ...]) -> list[Segment]:
    """The segment that each part lies in."""
    out: list[Segment] = []
    rest = list(asked.parts)
    for segment in plan:
        end = len(rest) if segment.after is None else rest.index(segment.after) + 1
        out += [segment] * end
        rest = rest[end:]
    assert not rest
    return out


@given(any_request(), any_defaults)
def test_any_plan(asked: PromptRequest, defaults: dict[Region, RegionDefault]) -> None:
    plan = segments(asked, defaults)
    assert plan[-1].after is None
    assert all(segment.after is not None for segment in plan[:-1])
    for before, after in pairwise(plan):
        assert before.scope <= after.scope
        assert before.covered >= after.covered
        assert not after.covered or before.ttl_s >= after.ttl_s
        assert (before.scope, before.ttl_s, before.covered) != (
            after.scope,
            after.ttl_s,
            after.covered,
        )

    def lifetime(i: int) -> int:
        named = asked.parts[i].mark
        default = asked.ttl_s or defaults[asked.parts[i].region].ttl_s
        return named.ttl_s if named and named.ttl_s else default

    marked = [i for i, p in enumerate(asked.parts) if p.mark]
    for i, segment in enumerate(spread(asked, plan)):
        part = asked.parts[i]
        covered = asked.automatic or any(j >= i for j in marked)
        assert segment.covered is covered
        assert segment.ttl_s in {60, 300, 3600}
        assert all(segment.ttl_s >= lifetime(j) for j in marked if j >= i)
        # Shared no wider than the client or the operator said of this part or any before it.
        said = [
            p.mark.scope for p in asked.parts[i:] if p.mark is not None and p.mark.scope is not None
        ]
        widest_said = min(said, default=SESSION)
        assert segment.scope >= min(defaults[part.region].scope, widest_said)
        if part.mark is not None and part.mark.scope is not None:
            assert segment.scope == part.mark.scope
