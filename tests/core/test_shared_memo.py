"""SharedMemo: nothing is found by others, and nobody pushes out another's share."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import Shares

LIMIT = 40
ORGS = ["acme", "globex", "key:1", "key:2", "key:3"]


def account_of(org: str) -> str:
    return "unlisted" if org.startswith("key:") else org


puts = st.lists(
    st.tuples(st.sampled_from(ORGS), st.integers(0, 9), st.integers(1, 12)), max_size=80
)


@given(puts)
def test_an_account_within_an_equal_share_loses_nothing(asked: list[tuple[str, int, int]]) -> None:
    memo: SharedMemo[int, int] = SharedMemo(LIMIT, int, account_of)
    put: dict[tuple[str, int], int] = {}
    accounts = {account_of(org) for org in ORGS}
    for org, key, size in asked:
        memo.put(org, key, size)
        put[org, key] = size
        assert memo.get(org, key) == size
        assert memo.size == sum(memo.of(None)) <= LIMIT
        wanted: Counter[str] = Counter()
        for (owner, _), put_size in put.items():
            wanted[account_of(owner)] += put_size
        for account in accounts:
            held = sum(sum(memo.of(o)) for o in memo.orgs() if account_of(o) == account)
            if wanted[account] <= LIMIT // len(accounts):
                assert held == wanted[account]
        put = {(o, k): s for (o, k), s in put.items() if memo.get(o, k) is not None}


@given(puts)
def test_an_organisation_finds_only_its_own(asked: list[tuple[str, int, int]]) -> None:
    memo: SharedMemo[int, tuple[str, int]] = SharedMemo(10_000, lambda _: 1, account_of)
    for org, key, size in asked:
        memo.put(org, key, (org, size))
    for org in ORGS:
        own = {key: size for owner, key, size in asked if owner == org}
        assert {key: memo.get(org, key) for key in own} == {k: (org, s) for k, s in own.items()}
        assert all(memo.get(org, key) is None for key in range(10) if key not in own)


def test_the_least_recently_used_goes_first() -> None:
    memo: SharedMemo[str, int] = SharedMemo(2)
    memo.put("acme", "a", 1)
    memo.put("acme", "b", 1)
    memo.get("acme", "a")
    memo.put("acme", "c", 1)
    assert [memo.get("acme", key) for key in "abc"] == [1, None, 1]
    assert len(memo) == 2


def test_what_is_larger_than_all_is_not_kept_and_costs_nobody() -> None:
    memo: SharedMemo[str, int] = SharedMemo(10, int)
    memo.put("acme", "a", 4)
    memo.put("globex", "b", 11)
    assert list(memo.of(None)) == [4]


def test_a_purge_drops_just_what_it_names() -> None:
    memo: SharedMemo[str, int] = SharedMemo(100, account_of=account_of)
    for org in ORGS:
        memo.put(org, "a", 1)
        memo.put(org, "b", 2)
    memo.purge("key:1", lambda key, _: key == "a")
    assert (memo.get("key:1", "a"), memo.get("key:1", "b"), memo.get("key:2", "a")) == (None, 2, 1)
    memo.purge("acme")
    assert memo.orgs() == set(ORGS) - {"acme"}
    memo.purge()
    assert (len(memo), memo.size, memo.orgs()) == (0, 0, set())


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(-5, 9)), max_size=200))
def test_the_largest_holder_is_known(changes: list[tuple[str, int]]) -> None:
    shares, held = Shares(), Counter[str]()
    for account, change in changes:
        change = max(change, -held[account])
        shares.add(account, change)
        held[account] += change
        assert shares.total == held.total()
        if shares.total:
            assert held[shares.largest()] == max(held.values())
