"""Who a request runs for."""

import hashlib

import pytest

from vllm_cachescope.tenancy.caller import ANONYMOUS, UNLISTED, CallerDirectory, api_key
from vllm_cachescope.tenancy.scope import Caller

SECRET = b"sixteen bytes at least"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


DIRECTORY = CallerDirectory(SECRET, {sha256("key-1"): "acme", sha256("key-2"): "acme"}, None)


def test_both_clients_way_to_send_a_key() -> None:
    assert api_key({"authorization": "Bearer key-1"}) == "key-1"
    assert api_key({"x-api-key": "key-1"}) == "key-1"
    assert api_key({"authorization": "Basic abc"}) is None


def test_a_tenants_keys_are_one_organisation() -> None:
    one = DIRECTORY.caller({"x-api-key": "key-1"}, None)
    two = DIRECTORY.caller({"authorization": "Bearer key-2"}, None)
    assert one == two == Caller("name:acme")


def test_a_listed_key_may_have_any_characters() -> None:
    directory = CallerDirectory(SECRET, {sha256("schlüssel-鍵"): "acme"}, None)
    as_it_comes = "schlüssel-鍵".encode().decode("latin-1")
    assert directory.caller({"x-api-key": as_it_comes}, None) == Caller("name:acme")


def test_organisations_that_anyone_can_make_up_share_an_account() -> None:
    made_up = [DIRECTORY.caller({"x-api-key": f"key-{i}"}, None).org for i in range(3, 6)]
    assert {DIRECTORY.account(org) for org in made_up} == {UNLISTED}
    gateway = CallerDirectory(SECRET, {}, "X-Org")
    closed = CallerDirectory(SECRET, {}, None, is_closed=True)
    for directory, org in [
        (DIRECTORY, "name:acme"),
        (DIRECTORY, ANONYMOUS),
        (gateway, gateway.caller({"x-org": "acme"}, None).org),
        (closed, made_up[0]),
    ]:
        assert directory.account(org) == org


@pytest.mark.parametrize(
    ("directory", "writers", "others"),
    [
        (DIRECTORY, ["name:acme"], [ANONYMOUS, "key:1"]),
        (CallerDirectory(SECRET, {}, None), ["key:1", ANONYMOUS], []),
        (CallerDirectory(SECRET, {}, "x-org"), ["header:acme"], [ANONYMOUS, "key:1"]),
        (CallerDirectory(SECRET, {}, None, is_closed=True), ["key:1"], [ANONYMOUS]),
        (
            CallerDirectory(SECRET, {sha256("k"): "acme"}, None, global_writers={"key:1"}),
            ["key:1"],
            ["name:acme", ANONYMOUS],
        ),
        (CallerDirectory(SECRET, {}, None, global_writers=()), [], ["key:1", ANONYMOUS]),
    ],
    ids=["listed", "nobody listed", "gateway", "server's keys", "chosen", "nobody"],
)
def test_who_may_write_what_everyone_shares(directory, writers, others) -> None:
    assert all(map(directory.may_write_global, writers))
    assert not any(map(directory.may_write_global, others))


def test_unlisted_keys_are_organisations_of_their_own_and_not_shown() -> None:
    one = DIRECTORY.caller({"x-api-key": "key-3"}, None).org
    two = DIRECTORY.caller({"x-api-key": "key-4"}, None).org
    assert len({one, two, "name:acme", ANONYMOUS}) == 4
    assert "key-3" not in one
    elsewhere = CallerDirectory(b"another secret here", {}, None)
    assert one != elsewhere.caller({"x-api-key": "key-3"}, None).org


def test_without_a_key_everyone_is_the_same_stranger() -> None:
    assert DIRECTORY.caller({}, None).org == ANONYMOUS


def test_a_gateways_header_counts_only_where_it_is_trusted() -> None:
    headers = {"x-organisation": "acme", "x-api-key": "key-3"}
    trusting = CallerDirectory(SECRET, {}, "X-Organisation")
    assert trusting.caller(headers, None).org == "header:acme"
    assert DIRECTORY.caller(headers, None).org.startswith("key:")


@pytest.mark.parametrize("forged", ["name:acme", "acme", "key:0123456789abcdef", ANONYMOUS])
def test_no_header_value_means_a_tenant_known_by_its_key(forged: str) -> None:
    trusting = CallerDirectory(SECRET, {sha256("key-1"): "acme"}, "x-org")
    real = {trusting.caller({"x-api-key": "key-1"}, None).org, trusting.caller({}, None).org}
    assert trusting.caller({"x-org": forged}, None).org not in real


def test_the_session_comes_from_a_header_before_the_body() -> None:
    assert DIRECTORY.caller({}, "body").session == "body"
    assert DIRECTORY.caller({"x-claude-code-session-id": "cc"}, "body").session == "cc"
    headers = {"x-claude-code-session-id": "cc", "x-cachescope-session": "cs"}
    assert DIRECTORY.caller(headers, "body").session == "cs"
    assert DIRECTORY.caller({}, None).session is None


@pytest.mark.parametrize(
    ("salt", "untrusted", "trusted"),
    [
        (None, ANONYMOUS, ANONYMOUS),
        ("", ANONYMOUS, ANONYMOUS),
        ("dynamo-cache-salt:", ANONYMOUS, ANONYMOUS),
        ("acme", "salt:acme", "name:acme"),
        ("dynamo-cache-salt:acme", "salt:acme", "name:acme"),
        ("nobody listed", "salt:nobody listed", "header:nobody listed"),
        ("name:acme", "salt:name:acme", "name:acme"),
        ("global", "salt:global", "salt:global"),
        ("\ud800", "salt:\ud800", "header:\ud800"),
    ],
)
def test_a_salt_is_an_organisation_and_a_tenant_only_where_it_is_trusted(salt, untrusted, trusted):
    directory = CallerDirectory(SECRET, {sha256("k"): "acme"}, "x-org")
    assert directory.of_salt(salt) == untrusted
    assert directory.of_salt(salt, is_trusted=True) == trusted
    assert directory.account(untrusted) == (untrusted if untrusted == ANONYMOUS else UNLISTED)
    assert not directory.may_write_global(untrusted)
    # An operator can name it, in quotas and purges.
    assert directory.named(untrusted) == [untrusted]
