"""OwnerTags: equal for equal organisations and sessions, and nothing else told."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.tenancy.owner_tags import NOBODY, TAG_BYTES, OwnerTags, org_of, owner_at
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys
from vllm_cachescope.tiers.keyspace import Keyspace, names_of, qualified, split

OWNERS = OwnerTags(b"secret")
names = st.text(max_size=4)
callers = st.builds(Caller, names, st.none() | names)


def identity(scope: Scope, caller: Caller) -> tuple[object, ...]:
    """Whose a block is, said without hashing."""
    if scope is Scope.GLOBAL:
        return ("everyone", caller.org)
    if scope is Scope.ORG or caller.session is None:
        return (caller.org,)
    return (caller.org, caller.session)


@given(st.lists(st.tuples(st.sampled_from(Scope), callers), min_size=2, max_size=8))
def test_owners_are_equal_exactly_where_identities_are(
    holders: list[tuple[Scope, Caller]],
) -> None:
    for (scope, one), (other_scope, other) in product(holders, holders):
        same = owner_at(scope, OWNERS.of(one)) == owner_at(other_scope, OWNERS.of(other))
        assert same == (identity(scope, one) == identity(other_scope, other))


@given(callers, callers)
def test_a_prefix_names_an_organisation_or_one_session_of_it(one: Caller, other: Caller) -> None:
    owner = OWNERS.of(one)
    assert owner.startswith(OWNERS.prefix(other.org)) == (one.org == other.org)
    if other.session is not None:
        assert owner.startswith(OWNERS.prefix(other.org, other.session)) == (one == other)
    assert org_of(owner) == OWNERS.prefix(one.org)
    assert len(owner) == len(NOBODY) == 2 * TAG_BYTES


def test_owners_are_no_scope_keys_and_differ_between_secrets() -> None:
    caller = Caller("acme", "s1")
    assert OWNERS.of(caller) != OwnerTags(b"another").of(caller)
    keys = ScopeKeys(b"secret")
    digests = {keys.key(scope, caller, "n")[: 2 * TAG_BYTES] for scope in Scope}
    assert digests.isdisjoint({OWNERS.prefix("acme").hex(), OWNERS.of(caller).hex()[16:]})


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=1, max_size=40))
def test_a_qualified_key_comes_apart_again(owner: bytes, block: bytes) -> None:
    assert split(qualified(owner, block)) == (owner, block)


def test_a_name_tells_the_tags_and_is_found_by_them() -> None:
    # Redis' patterns without its escapes, of which these names need none.
    from fnmatch import fnmatchcase

    keyspaces = [Keyspace({"model": model}) for model in ("a", "b")]
    owners = {
        caller: OWNERS.of(caller)
        for caller in (Caller("acme", "s1"), Caller("acme", "s2"), Caller("acme"), Caller("zeta"))
    }
    found = {
        prefix: {
            (caller, keyspace.namespace)
            for caller, owner in owners.items()
            for keyspace in keyspaces
            if fnmatchcase(keyspace.name(qualified(owner, b"block")).decode(), pattern.decode())
        }
        for prefix, pattern in (
            (p, names_of(p)) for p in (b"", OWNERS.prefix("acme"), OWNERS.prefix("acme", "s1"))
        )
    }
    spaces = [keyspace.namespace for keyspace in keyspaces]
    assert found[b""] == set(product(owners, spaces))
    assert found[OWNERS.prefix("acme")] == set(product(list(owners)[:3], spaces))
    assert found[OWNERS.prefix("acme", "s1")] == set(product([Caller("acme", "s1")], spaces))
    assert not fnmatchcase(keyspaces[0].handshake.decode(), names_of(b"").decode())
