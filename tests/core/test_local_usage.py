"""What an engine counts of a tier whose store does not count itself."""

import random

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import OrgQuota
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG
from vllm_cachescope.tiers.expiry import expiry
from vllm_cachescope.tiers.local_usage import LocalUsage

ACME, ZETA = b"acme    s1      ", b"zeta    s1      "


def blocks(
    owner: bytes, *numbers: int, used_at: float = 0, ttl_s: int = 300, behind: int = 0
) -> list[tuple[bytes, float]]:
    """Return blocks of one prompt, in order, of which ``behind`` come before."""
    return [
        (name, expiry(used_at, ttl_s, (behind + i + 1) * 16))
        for i, name in enumerate(names(owner, *numbers))
    ]


def names(owner: bytes, *numbers: int) -> list[bytes]:
    return [owner + b"%d" % number for number in numbers]


def test_an_organisation_over_its_quota_loses_its_oldest() -> None:
    usage = LocalUsage(Quotas(10, OrgQuota(quota=30), {}))
    assert usage.stored(blocks(ACME, 1, 2, 3), 0) == []
    assert usage.stored(blocks(ZETA, 1, 2, used_at=1), 1) == []
    # A prompt loses its end before its beginning.
    usage.touch(blocks(ACME, 1, 2, used_at=2))
    assert usage.stored(blocks(ACME, 4, used_at=3), 3) == names(ACME, 3)
    assert usage.stored(blocks(ACME, 4, 5, 6, used_at=4), 4) == names(ACME, 2, 1)
    assert usage.shown(5) == {ACME[:8].hex(): 30, ZETA[:8].hex(): 20}


def test_organisations_that_anyone_can_make_up_are_one() -> None:
    usage = LocalUsage(Quotas(10, OrgQuota(quota=30, reserve=30), {}))
    made_up = [b"\x80unlist%d--------" % i for i in range(4)]
    usage.stored(blocks(ACME, 1, 2), 0)
    for i, owner in enumerate(made_up[:3]):
        assert usage.stored(blocks(owner, 1, used_at=i), i) == []
    assert usage.stored(blocks(made_up[3], 1, used_at=3), 3) == names(made_up[0], 1)
    assert usage.shown(4) == {UNLISTED_TAG.hex(): 30, ACME[:8].hex(): 20}
    usage.purged(made_up[3][:8])
    assert usage.shown(4)[UNLISTED_TAG.hex()] == 20


def test_a_prompt_stored_in_parts_keeps_its_beginning() -> None:
    usage = LocalUsage(Quotas(10, OrgQuota(quota=50), {}))
    usage.stored(blocks(ACME, 91, 92, 93), 0)
    # Each step of a long prefill stores what it computed; the prompt was first used at 10.
    gone = []
    for step in range(4):
        numbers = (2 * step, 2 * step + 1)
        gone += usage.stored(blocks(ACME, *numbers, used_at=10, behind=2 * step), 11 + step)
    assert gone == names(ACME, 93, 92, 91, 5, 7, 6)


def test_a_use_takes_nothing_away() -> None:
    usage = LocalUsage(Quotas(10, OrgQuota(quota=20), {}))
    usage.stored(blocks(ACME, 1, ttl_s=3600), 0)
    usage.stored(blocks(ACME, 2, used_at=1), 1)
    usage.touch(blocks(ACME, 1, used_at=2, ttl_s=10))
    usage.touch(blocks(ACME, 3, used_at=2))
    assert usage.stored(blocks(ACME, 4, used_at=3), 3) == names(ACME, 2)


def test_what_has_expired_or_was_purged_does_not_count() -> None:
    usage = LocalUsage(Quotas(10, OrgQuota(quota=20), {}))
    usage.stored(blocks(ACME, 1, 2), 0)
    assert usage.shown(299) == {ACME[:8].hex(): 20}
    assert usage.shown(300) == {}
    assert usage.stored(blocks(ACME, 3, 4, used_at=300), 300) == []
    usage.purged(ACME[:8])
    assert usage.shown(300) == {}
    usage.touch(blocks(ACME, 3, used_at=301))
    assert usage.stored(blocks(ACME, 5, 6, used_at=301), 301) == []


def test_over_the_capacity_reserves_are_spared() -> None:
    quotas = Quotas(10, OrgQuota(), {ZETA[:8]: OrgQuota(reserve=20)}, capacity=50)
    usage = LocalUsage(quotas)
    usage.stored(blocks(ZETA, 1, 2), 0)
    assert usage.stored(blocks(ACME, 1, 2, 3, used_at=1), 1) == []
    assert usage.stored(blocks(ACME, 4, used_at=2), 2) == names(ACME, 3)
    assert usage.stored(blocks(ZETA, 3, used_at=3), 3) == names(ZETA, 2)
    # What is beyond a reserve goes by age, with all the rest.
    gone = usage.stored(blocks(ZETA, 4, 5, 6, used_at=4), 4)
    assert gone == names(ZETA, 1) + names(ACME, 2, 1)


def test_what_goes_is_what_a_list_in_order_of_expiry_would_lose() -> None:
    chance = random.Random(0)
    usage, kept = LocalUsage(Quotas(10, OrgQuota(quota=200), {})), dict[bytes, float]()
    for now in range(600):
        entries = blocks(
            ACME, *chance.sample(range(60), 4), used_at=now, ttl_s=chance.choice([20, 100])
        )
        if chance.random() < 0.5:
            usage.touch(entries)
            known = {key: until for key, until in entries if key in kept}
            kept |= {key: max(until, kept[key]) for key, until in known.items()}
            continue
        gone = usage.stored(entries, now)
        kept |= {key: max(until, kept.get(key, 0.0)) for key, until in entries}
        kept = {key: until for key, until in kept.items() if until > now}
        order = sorted(kept, key=kept.__getitem__)
        assert gone == order[: max(0, len(order) - 20)]
        for key in gone:
            del kept[key]
    assert usage.shown(600)[ACME[:8].hex()] == 10 * sum(u > 600 for u in kept.values())
