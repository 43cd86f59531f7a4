"""A connector whose metrics and ledger are switched on and off while it runs, and which says how
long counting takes. Two servers differ more from each other than one with metrics does from one
without.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_cachescope.api.ignored_markers import IgnoredMarkers
from vllm_cachescope.api.recorder import Recorder
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.api.stage_times import StageTimes
from vllm_cachescope.connectors.vllm.engine import connector, stats
from vllm_cachescope.connectors.vllm.engine.connector import CacheScopeConnector
from vllm_cachescope.connectors.vllm.engine.counts import Counts
from vllm_cachescope.connectors.vllm.engine.gauges import Gauges
from vllm_cachescope.connectors.vllm.engine.held_stats import HeldStats
from vllm_cachescope.connectors.vllm.engine.prompt_lifetimes import PromptLifetimes
from vllm_cachescope.usage.writer import Writer

VARIABLE = "CACHESCOPE_BENCHMARK_SWITCH"
"""Environment variable with the path of the switch's file."""

_SLOTS = 8
_SLOT = struct.Struct("qd")
"""Of each process: its id, and the seconds that counting has taken in it."""


class Switch:
    """Whether metrics are counted, and how long that took: in a file that processes share.

    Args:
        path: the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        size = 8 + _SLOTS * _SLOT.size
        if not path.exists():
            path.write_bytes(bytes([True]).ljust(size, b"\0"))
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), size)
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether metrics are counted."""
        return bool(self._shared[0])

    def turn(self, on: bool) -> None:
        """Have metrics counted from here on, or not."""
        self._shared[0] = on

    @property
    def spent_s(self) -> float:
        """Seconds of CPU time that counting has taken so far, in all processes."""
        return sum(seconds for _, seconds in _SLOT.iter_unpack(self._shared[8:]))

    def spend(self, seconds: float) -> None:
        """Note that counting took ``seconds`` more in this process."""
        with self._lock:
            at = self._own_slot()
            _, before_s = _SLOT.unpack_from(self._shared, at)
            _SLOT.pack_into(self._shared, at, os.getpid(), before_s + seconds)

    def _own_slot(self) -> int:
        for at in range(8, 8 + _SLOTS * _SLOT.size, _SLOT.size):
            if _SLOT.unpack_from(self._shared, at)[0] in (0, os.getpid()):
                return at
        raise RuntimeError("too many processes")


def install(switch: Switch) -> None:
    """Have everything that counts look at ``switch`` first."""
    for owner, name in (
        (Counts, "add_report"),
        (Counts, "add_reads"),
        (Counts, "add_eviction"),
        (Counts, "move_to"),
        (Gauges, "report_to"),
        (HeldStats, "add"),
        (HeldStats, "take"),
        (stats.ScopePromMetrics, "observe"),
        (connector, "add_copies"),
        (connector, "move_remote_counts"),
        (StageTimes, "count"),
        (IgnoredMarkers, "count"),
        (Recorder, "record"),
    ):
        setattr(owner, name, _switched(getattr(owner, name), switch))
    # A thread writes what was left while it was on.
    Writer._write = _timed(Writer._write, switch)  # type: ignore[method-assign]
    measure: Any = RequestContext.stage

    @contextmanager
    def timed(context: RequestContext, name: str) -> Iterator[None]:
        began = time.thread_time()
        with measure(context, name):
            entered = time.thread_time()
            yield
            left = time.thread_time()
        switch.spend(entered - began + time.thread_time() - left)

    def stage(context: RequestContext, name: str) -> AbstractContextManager[None]:
        return timed(context, name) if switch.is_on else nullcontext()

    RequestContext.stage = stage  # type: ignore[method-assign, assignment]
    register = PromptLifetimes.register

    def register_uncounted(self: Any, *args: Any, reads: Any = None, **options: Any) -> bool:
        return register(self, *args, reads=reads if switch.is_on else None, **options)

    PromptLifetimes.register = register_uncounted  # type: ignore[method-assign]


def _switched(function: Callable[..., Any], switch: Switch) -> Callable[..., Any]:
    timed = _timed(function, switch)

    @wraps(function)
    def switched(*args: Any, **options: Any) -> Any:
        return timed(*args, **options) if switch.is_on else None

    return switched


def _timed(function: Callable[..., Any], switch: Switch) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            switch.spend(time.thread_time() - began)

    return timed


class SwitchedConnector(CacheScopeConnector):
    """The product's connector, with a switch."""


if VARIABLE in os.environ:
    install(Switch(Path(os.environ[VARIABLE])))
