"""The announcement of a purge by someone who runs no engine: the purge log of a store is enough."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_cachescope.tiers.fleet_purges import CONFIRM_S, FOLLOW_S, LIVE_S
from vllm_cachescope.tiers.purge_log import PurgeLog
from vllm_cachescope.tiers.purge_notices import PurgeNotice, PurgeNotices

SETTLE_S = 2 * FOLLOW_S
"""How long to look for engines at least, in seconds: one that runs has read the log by then, and
is listed though the list was lost."""

_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Heard:
    """What engines have said of an announced purge.

    Attributes:
        confirmed: the names of those that have carried it out.
        missing: by the names of those that may not have, the reason.
    """

    confirmed: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def announce(
    log: PurgeLog,
    notices: PurgeNotices,
    notice: PurgeNotice,
    timeout_s: float,
    clock: Callable[[], float],
    pause: Callable[[float], object],
) -> Heard:
    """Have all engines that follow a log carry out a purge; wait until they have, for `CONFIRM_S`
    at most.

    Args:
        log: the log.
        notices: seals what stands there.
        notice: which purge.
        timeout_s: how long the store may take to answer, in seconds.
        clock: the clock of the store's deadlines, in seconds.
        pause: waits for so many seconds.

    Raises:
        StoreFailed: if the store does not answer.
    """
    began = clock()
    position = log.announce(notices.seal(notice), clock() + timeout_s)
    while True:
        confirmed, missing = [], {}
        for follower in log.followers(clock() + timeout_s):
            progress = notices.progress(follower.follower_id, follower.claim)
            if progress is None or follower.idle_s >= LIVE_S:
                continue
            if progress.position >= position:
                confirmed.append(progress.name)
            else:
                missing[progress.name] = (
                    f"it has not said within {CONFIRM_S:g} s that it is done; it was last heard of "
                    f"{follower.idle_s:.1f} s ago, and purges before it serves anyone again"
                )
        waited_s = clock() - began
        if waited_s >= CONFIRM_S or (waited_s >= SETTLE_S and not missing):
            return Heard(sorted(confirmed), missing)
        pause(_PAUSE_S)
