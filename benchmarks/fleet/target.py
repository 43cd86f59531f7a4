"""Targets: what is asked of a fleet, and whether the measured rows hold it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.fleet.engine import Engine, FrontEnd, Tiers
from benchmarks.fleet.measured import Measured
from benchmarks.fleet.router import Policy
from benchmarks.fleet.row import ONE_REPLICA

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


@dataclass(frozen=True, slots=True)
class Pair:
    """The plugin beside plain vLLM, behind the same router.

    Attributes:
        ours: with the plugin.
        plain: without; by the same choices where they can be replayed and decide.
    """

    ours: Measured
    plain: Measured

    @property
    def ratio(self) -> float:
        """Of the medians of what is read. Editions differ by a digit: shares are compared."""
        return self.ours.shares.median / self.plain.shares.median

    @property
    def holds(self) -> bool:
        """Whether it reads as much as plain vLLM, as far as that agrees with itself: how agents'
        calls meet differs from run to run, and the least that plain vLLM read is what counts."""
        return self.ours.shares.median >= self.plain.shares.low


def alike(first: Measured, again: Measured | None) -> Measured:
    """Return plain vLLM's runs by the same choices: the first, which is replayed, and the replays
    of it."""
    return Measured(first.row, (first.runs[0], *(again.runs if again else ())))


def pairs(rows: Sequence[Measured]) -> list[Pair]:
    """Return each row with the plugin beside its row without, where both were measured.

    A router that chooses anew has other calls on each replica, and who has more evicts more. Where
    nothing stands behind the device that decides, and the same choices are compared if the router
    tells of them.
    """
    plain = {(one.row.router, one.row.replays): one for one in rows if not one.row.engine.plugin}
    replayed = {one.row.router for one in rows if one.row.replays and one.row.engine.plugin}
    found = []
    for one in rows:
        router, replays = one.row.router, one.row.replays
        anew = one.row.engine.tiers is Tiers.DEVICE and router in replayed and not replays
        other = plain.get((router, False))
        if replays and other is not None:
            other = alike(other, plain.get((router, True)))
        if one.row.engine.plugin and not anew and other is not None:
            found.append(Pair(one, other))
    return found


def verdicts(rows: Sequence[Measured]) -> list[Verdict]:
    """Return the targets for which enough was measured."""
    return [*_against_plain(rows), *_as_one(rows), *_as_soon(rows), *_apart(rows)]


def _against_plain(rows: Sequence[Measured]) -> Iterator[Verdict]:
    if compared := pairs(rows):
        # Who misses it first, then who has least.
        least = min(compared, key=lambda pair: (pair.holds, pair.ratio))
        own = least.plain.shares
        found = f"least {least.ratio:.3f}: {least.ours.row.name}; plain vLLM's own runs "
        found += f"{own.low / own.median:.3f} to {own.high / own.median:.3f} of their median"
        yield Verdict("never fewer tokens read than plain vLLM", found, least.holds)


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
        ratio = random.shares.median / one.shares.median
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
