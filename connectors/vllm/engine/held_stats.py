"""Statistics that are held for some steps: to send and to count them takes as long for many as for
few, and nobody looks at metrics more than once a second."""

from collections.abc import Callable

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

HELD_S = 0.25
"""How long statistics of a busy engine are held, in seconds."""


class HeldStats:
    """Statistics of the steps since they were last taken.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_at = clock()
        self._held = OffloadingConnectorStats()

    def add(self, stats: OffloadingConnectorStats) -> None:
        """Add what a step has brought."""
        self._held.aggregate(stats)

    def are_due(self, is_idle: bool) -> bool:
        """Whether the statistics are to be taken.

        Args:
            is_idle: whether no request runs, and there may be no further step.
        """
        return is_idle or self._clock() >= self._due_at

    def take(self, is_idle: bool) -> OffloadingConnectorStats | None:
        """Return the statistics that are held, and hold none of them any more; None if they are not
        due.

        Args:
            is_idle: whether no request runs, and there may be no further step.
        """
        if not self.are_due(is_idle):
            return None
        self._due_at = self._clock() + HELD_S
        taken, self._held = self._held, OffloadingConnectorStats()
        return taken
