"""Reports: every token of a prompt has one outcome, whatever happened."""

from hypothesis import given
from hypothesis import strategies as st

from tests.core.plans import PLAN, plans
from vllm_cachescope.cache.report import Outcome, Report, attribute_tokens
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Scope


def test_rows_split_by_outcome_scope_and_lifetime() -> None:
    report = attribute_tokens(PLAN, 16, [(Outcome.READ_DEVICE, 64), ("read_cpu", 64)], range(8, 18))
    assert {(r.outcome, r.scope, r.ttl_s): r.tokens for r in report.rows} == {
        ("read_device", Scope.GLOBAL, 3600): 64,
        ("read_cpu", Scope.GLOBAL, 3600): 32,  # the block over position 100 is the org's
        ("read_cpu", Scope.ORG, 300): 32,
        ("created", Scope.ORG, 300): 160,
        ("uncached", Scope.SESSION, 0): 62,
    }
    assert report.prompt_tokens == 350
    assert report.read_tokens == 128
    assert report.read_by_tier == {"device": 64, "cpu": 64}
    assert report.created_by_ttl == {300: 160}
    assert report.uncached_tokens == 62


@given(plans(), st.integers(1, 64), st.data())
def test_rows_add_up_to_the_prompt(plan: Plan, block_size: int, data: st.DataObject) -> None:
    prompt = plan.spans[-1].end
    blocks = prompt // block_size
    read = data.draw(st.integers(0, blocks))
    split = data.draw(st.integers(0, read))
    created = data.draw(st.sets(st.integers(read, max(blocks - 1, read)))) if blocks > read else []
    report = attribute_tokens(
        plan,
        block_size,
        [("read_device", split * block_size), ("read_cpu", (read - split) * block_size)],
        created,
    )
    assert report.prompt_tokens == prompt
    assert report.read_tokens == read * block_size
    assert report.tokens(Outcome.CREATED) == len(created) * block_size
    assert Report.from_wire(report.to_wire()) == report
