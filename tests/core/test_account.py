"""What an engine counts of a tier that keeps no account itself."""

from vllm_cachescope.config import Share
from vllm_cachescope.shares import Shares
from vllm_cachescope.tiers.account import Account

ACME, ZETA = b"acme    s1      ", b"zeta    s1      "


def keys(owner: bytes, *numbers: int, ttl_s: int = 300) -> list[tuple[bytes, int]]:
    return [(owner + b"%d" % number, ttl_s) for number in numbers]


def names(owner: bytes, *numbers: int) -> list[bytes]:
    return [key for key, _ in keys(owner, *numbers)]


def test_an_organisation_over_its_quota_loses_its_oldest() -> None:
    account = Account(Shares(10, Share(quota=30), {}))
    assert account.stored(keys(ACME, 1, 2, 3), 0) == []
    assert account.stored(keys(ZETA, 1, 2), 1) == []
    # A prompt loses its end before its beginning.
    account.used(names(ACME, 1, 2), 2)
    assert account.stored(keys(ACME, 4), 3) == names(ACME, 3)
    assert account.stored(keys(ACME, 4, 5, 6), 4) == names(ACME, 2, 1)
    assert account.shown() == {ACME[:8].hex(): 30, ZETA[:8].hex(): 20}


def test_what_has_expired_or_was_purged_does_not_count() -> None:
    account = Account(Shares(10, Share(quota=20), {}))
    account.stored(keys(ACME, 1, 2), 0)
    assert account.stored(keys(ACME, 3, 4), 300) == []
    account.purged(ACME[:8])
    assert account.shown() == {}
    account.used(names(ACME, 3), 301)
    assert account.stored(keys(ACME, 5, 6), 301) == []


def test_over_the_capacity_reserves_are_spared() -> None:
    shares = Shares(10, Share(), {ZETA[:8]: Share(reserve=20)}, capacity=50)
    account = Account(shares)
    account.stored(keys(ZETA, 1, 2), 0)
    assert account.stored(keys(ACME, 1, 2, 3), 1) == []
    assert account.stored(keys(ACME, 4), 2) == names(ACME, 3)
    assert account.stored(keys(ZETA, 3), 3) == names(ZETA, 2)
    # What is beyond a reserve goes by age, with all the rest.
    gone = account.stored(keys(ZETA, 4, 5, 6), 4)
    assert gone == names(ZETA, 1) + names(ACME, 2, 1)
