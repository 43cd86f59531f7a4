"""Targets: what is asked of a fleet, and whether the measured rows hold it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.fleet.engine import Engine, FrontEnd, Tiers
from benchmarks.fleet.router import Policy
from benchmarks.fleet.row import ONE_REPLICA, Measured

AS_ONE = 0.97
"""Of what one big replica reads, what random routing with Redis reads at least."""

AS_SOON = 1.3
"""Of the median time to the first token of routing by prefix, what random routing takes at most."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target.

    Attributes:
        asked: what is asked.
        found: what was found.
        holds: whether that is met.
    """

    asked: str
    found: str
    holds: bool


def verdicts(rows: Sequence[Measured]) -> list[Verdict]:
    """Return the targets for which enough was measured."""
    return [*_against_plain(rows), *_as_one(rows), *_as_soon(rows), *_apart(rows)]


def _against_plain(rows: Sequence[Measured]) -> Iterator[Verdict]:
    plain = {one.row.router: one for one in rows if not one.row.engine.plugin}
    replayed = {one.row.router for one in rows if one.row.replays}
    pairs = [
        (one, plain[one.row.router])
        for one in rows
        if one.row.engine.plugin
        and one.row.router in plain
        # A router that chooses anew has other calls on each replica: who has more evicts more.
        # Where nothing else stands behind the device, that decides.
        and (
            one.row.replays
            or one.row.engine.tiers is not Tiers.DEVICE
            or one.row.router not in replayed
        )
    ]
    if pairs:
        # Editions differ by a digit: shares are compared, not tokens.
        ratio, name = min((one.share / other.share, one.row.name) for one, other in pairs)
        yield Verdict(
            "never fewer tokens read than plain vLLM", f"least {ratio:.3f}: {name}", ratio >= 1
        )


def _with_redis(rows: Sequence[Measured], name: str, policy: Policy) -> Measured | None:
    engine = Engine(FrontEnd.PYTHON, True, Tiers.REDIS)
    found = (
        one
        for one in rows
        if one.row.engine == engine
        and one.row.router.name == name
        and one.row.router.policy is policy
    )
    return next(found, None)


def _as_one(rows: Sequence[Measured]) -> Iterator[Verdict]:
    one = _with_redis(rows, ONE_REPLICA.name, ONE_REPLICA.policy)
    random = _with_redis(rows, "the client", Policy.RANDOM)
    if one and random:
        ratio = random.share / one.share
        asked = f"random with Redis reads {AS_ONE} of what one big replica reads"
        yield Verdict(asked, f"{ratio:.3f}", ratio >= AS_ONE)


def _as_soon(rows: Sequence[Measured]) -> Iterator[Verdict]:
    random = _with_redis(rows, "the client", Policy.RANDOM)
    prefix = _with_redis(rows, "SMG", Policy.PREFIX)
    if random and prefix:
        ratio = random.p50_ms / prefix.p50_ms
        asked = f"random with Redis answers within {AS_SOON} times of routing by prefix, median"
        yield Verdict(asked, f"{ratio:.2f}", ratio <= AS_SOON)


def _apart(rows: Sequence[Measured]) -> Iterator[Verdict]:
    looked_at = [one for one in rows if one.across is not None and one.row.engine.plugin]
    if looked_at:
        across = sum(one.across or 0 for one in looked_at)
        # Who reads nothing of its own shows nothing by reading nothing of others.
        own = min(one.own or 0 for one in looked_at)
        found = f"{across} tokens in {len(looked_at)} rows; of its own at least {own:,}"
        yield Verdict("a tenant reads nothing of another one's", found, across == 0 and own > 0)
