"""Which account a block counts towards, and what that account may hold."""

from hashlib import sha256

import pytest

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.quotas import Quotas, read_quotas
from vllm_cachescope.config import ConfigError, load
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG, OwnerTags, owner_at
from vllm_cachescope.tenancy.scope import Caller, Scope

SECRET = "a secret of the tests"
OWNERS = OwnerTags(SECRET.encode())
TENANTS = {sha256(b"k").hexdigest(): "acme"}


def made_up(number: int) -> bytes:
    return OWNERS.of(Caller(f"key:{number}", "s"), is_listed=False)


def shared_by(name: str) -> bytes:
    return owner_at(Scope.GLOBAL, OWNERS.of(Caller(name)))


def quotas_of(**tier: object) -> Quotas:
    config = load({"secret": SECRET, "tenants": TENANTS, "quotas": {"cpu": tier}})
    found = read_quotas(config, "cpu", 1024)
    assert found is not None
    return found


class Tier:
    """A tier of 40 blocks that evicts as the CPU tier's policy does."""

    def __init__(self, quotas: Quotas) -> None:
        self.ledger, self.order = Ledger(), LifetimeShare(quotas.reserve)
        self.ledger.follow("cpu", self.order, quotas.account_of)
        self.now = 0.0

    def fill(self, owner: bytes, count: int) -> list[bytes]:
        keys = []
        for _ in range(count):
            self.now += 1
            if len(self.order) == 40:
                (oldest,) = self.order.victims(1, self.now, lambda key: False) or []
                self.ledger.displace(oldest, "cpu")
            keys.append(b"%d" % self.now)
            self.ledger.touch(keys[-1], 3600, self.now, owner)
            self.ledger.place(keys[-1], "cpu")
        return keys


def test_made_up_organisations_do_not_push_a_tenant_below_its_reserve() -> None:
    tier = Tier(quotas_of(reserve="10KiB"))
    mine = tier.fill(OWNERS.of(Caller("name:acme")), 10)
    for number in range(12):
        tier.fill(made_up(number), 5)
    assert all(key in tier.ledger for key in mine)


def test_one_writer_does_not_push_out_what_another_shares_with_everyone() -> None:
    tier = Tier(quotas_of(orgs={"global": {"reserve": "10KiB"}}))
    handbook = tier.fill(shared_by("name:acme"), 10)
    tier.fill(shared_by("name:zeta"), 100)
    assert all(key in tier.ledger for key in handbook)


def test_an_account_has_a_quota_and_only_a_listed_one_a_reserve() -> None:
    quotas = quotas_of(quota="8KiB", reserve="2KiB", orgs={"global": {"quota": "4KiB"}})
    accounts = {quotas.account_of(made_up(number)) for number in range(5)}
    assert accounts == {UNLISTED_TAG}
    acme = quotas.account_of(OWNERS.of(Caller("name:acme", "s")))
    assert acme == OWNERS.prefix("name:acme")
    assert (quotas.over(acme, 9), quotas.reserve(acme)) == (1, 2)
    assert (quotas.over(UNLISTED_TAG, 9), quotas.reserve(UNLISTED_TAG)) == (1, 0)
    # Each writer has what the operator gave to global.
    writers = [quotas.account_of(shared_by(name)) for name in ("name:acme", "name:zeta")]
    assert len(set(writers)) == 2
    assert {(quotas.over(writer, 9), quotas.reserve(writer)) for writer in writers} == {(5, 2)}


def test_the_operator_may_give_them_more_together_or_to_one_of_them() -> None:
    orgs = {"unlisted": {"quota": "3KiB", "reserve": "1KiB"}, "key:7": {"quota": "2KiB"}}
    quotas = quotas_of(quota="8KiB", orgs=orgs)
    one, others = quotas.account_of(made_up(7)), quotas.account_of(made_up(8))
    assert (one, others) == (made_up(7)[:8], UNLISTED_TAG)
    assert (quotas.over(one, 9), quotas.over(others, 9), quotas.reserve(others)) == (7, 6, 1)
    # Where the server insists on keys they are organisations like others.
    assert quotas.over(quotas.account_of(OWNERS.of(Caller("key:7"))), 9) == 7
    assert quotas.over(quotas.account_of(OWNERS.of(Caller("key:8"))), 9) == 1


def test_writers_are_organisations() -> None:
    config = load({"tenants": TENANTS, "global_writers": ["acme", "key:7"]})
    assert config.global_writer_ids() == {"name:acme", "key:7"}
    for name in ("zeta", "global"):
        wrong = load({"tenants": TENANTS, "global_writers": [name]})
        with pytest.raises(ConfigError, match=f"global_writers: '{name}'.* allowed: a name in"):
            wrong.check(lambda tier: None)
