"""Scope keys: equal for those who share, different for everyone else."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

KEYS = ScopeKeys(b"secret")
names = st.text(max_size=4)
callers = st.builds(Caller, names, st.none() | names)


def identity(scope: Scope, caller: Caller, nonce: str) -> tuple[object, ...]:
    """Who shares a key, said without hashing."""
    if scope is Scope.GLOBAL:
        return ("global",)
    if scope is Scope.ORG:
        return ("org", caller.org)
    if caller.session is None:
        return ("private", nonce)
    return ("session", caller.org, caller.session)


@given(st.lists(st.tuples(st.sampled_from(Scope), callers, names), min_size=2, max_size=8))
def test_keys_are_equal_exactly_where_identities_are(
    holders: list[tuple[Scope, Caller, str]],
) -> None:
    for one, other in product(holders, holders):
        assert (KEYS.key(*one) == KEYS.key(*other)) == (identity(*one) == identity(*other))


def test_another_secret_gives_other_keys() -> None:
    other = ScopeKeys(b"another")
    for scope in Scope:
        assert KEYS.key(scope, Caller("a", "s"), "n") != other.key(scope, Caller("a", "s"), "n")
