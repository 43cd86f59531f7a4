"""The joining of a tier's threads, within a deadline."""

from collections.abc import Callable, Iterable
from threading import Thread


def join(threads: Iterable[Thread], deadline: float, clock: Callable[[], float]) -> None:
    """Wait until threads have ended, or for the deadline; a tenth of a second for each at least.

    Args:
        threads: those that were not started are over.
        deadline: on ``clock``, in seconds.
        clock: the tier's clock.
    """
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.1, deadline - clock()))
