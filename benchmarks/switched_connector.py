"""A connector whose metrics are switched on and off while it runs, and which says how long counting
takes. Two servers differ more from each other than one with metrics does from one without.

Everything is in one process: a server of the benchmarks is one.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_cachescope.api.ignored_markers import IgnoredMarkers
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.api.stage_times import StageTimes
from vllm_cachescope.connectors.vllm.engine import connector, stats
from vllm_cachescope.connectors.vllm.engine.connector import CacheScopeConnector
from vllm_cachescope.connectors.vllm.engine.counts import Counts
from vllm_cachescope.connectors.vllm.engine.gauges import Gauges
from vllm_cachescope.connectors.vllm.engine.scheduler import CacheScopeConnectorScheduler

VARIABLE = "CACHESCOPE_BENCHMARK_SWITCH"
"""Environment variable with the path of the switch's file."""

_LAYOUT = struct.Struct("?d")


class Switch:
    """Whether metrics are counted, and how long that took: in a file that processes share.

    Args:
        path: the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_LAYOUT.pack(True, 0.0))
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _LAYOUT.size)

    @property
    def is_on(self) -> bool:
        """Whether metrics are counted."""
        return bool(self._shared[0])

    def turn(self, on: bool) -> None:
        """Have metrics counted from here on, or not."""
        self._shared[0] = on

    @property
    def spent_s(self) -> float:
        """Seconds that counting has taken so far."""
        return float(_LAYOUT.unpack(self._shared[:])[1])

    def spend(self, seconds: float) -> None:
        """Note that counting took ``seconds`` more."""
        _LAYOUT.pack_into(self._shared, 0, self.is_on, self.spent_s + seconds)


def install(switch: Switch) -> None:
    """Have everything that counts look at ``switch`` first."""
    for owner, name in (
        (Counts, "add_report"),
        (Counts, "add_reads"),
        (Counts, "add_eviction"),
        (Counts, "move_to"),
        (Gauges, "report_to"),
        (stats.ScopePromMetrics, "observe"),
        (connector, "add_copies"),
        (connector, "move_remote_counts"),
        (StageTimes, "count"),
        (IgnoredMarkers, "count"),
    ):
        setattr(owner, name, _switched(getattr(owner, name), switch))
    measure: Any = RequestContext.stage

    @contextmanager
    def timed(context: RequestContext, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with measure(context, name):
            entered = time.perf_counter()
            yield
            left = time.perf_counter()
        switch.spend(entered - began + time.perf_counter() - left)

    def stage(context: RequestContext, name: str) -> AbstractContextManager[None]:
        return timed(context, name) if switch.is_on else nullcontext()

    RequestContext.stage = stage  # type: ignore[method-assign, assignment]
    register = CacheScopeConnectorScheduler._register

    def register_uncounted(self: Any, *args: Any, reads: Any = None, **options: Any) -> bool:
        return register(self, *args, reads=reads if switch.is_on else None, **options)

    CacheScopeConnectorScheduler._register = register_uncounted  # type: ignore[method-assign]


def _switched(function: Callable[..., Any], switch: Switch) -> Callable[..., Any]:
    @wraps(function)
    def switched(*args: Any, **options: Any) -> Any:
        if not switch.is_on:
            return None
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            switch.spend(time.perf_counter() - began)

    return switched


class SwitchedConnector(CacheScopeConnector):
    """The product's connector, with a switch."""


if VARIABLE in os.environ:
    install(Switch(Path(os.environ[VARIABLE])))
