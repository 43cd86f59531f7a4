"""The idle sweep: has an engine drop what expires though nobody asks it to.

The API side asks every engine now and then. Other front ends do not, and an engine without work
sleeps: its metrics and KV events would show expired blocks until the next request.
"""

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine import core as engine_core

from vllm_cachescope.connectors.vllm import engine_rpc

LOOK_S = 0.5
"""How often to look whether a sweep is due, in seconds, or more often."""

_SWEEP = "idle_sweep"
"""The connector's attribute."""


class IdleSweep:
    """Says when an engine has to sweep by itself. Its time is the machine's, not the ledger's.

    Args:
        interval_s: how often an idle engine sweeps, in seconds.
        clock: seconds, never running backwards.
        is_wanted: whether there is another reason to sweep.
    """

    def __init__(
        self,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        is_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        # Whoever asks for sweeps at this interval is never quite on time.
        self._patience_s = 1.5 * interval_s
        self._clock = clock
        self._is_wanted = is_wanted
        self._swept_at: float | None = None
        self._wake: Callable[[], object] = lambda: None

    def begin(self, wake: Callable[[], object] = lambda: None) -> None:
        """The engine runs a loop of its own, which ``wake`` wakes."""
        self._swept_at, self._wake = self._clock(), wake

    def wake(self) -> None:
        """Have an engine that has nothing to do look whether there is something. Called on any
        thread."""
        self._wake()

    def note(self) -> None:
        """The engine sweeps."""
        if self._swept_at is not None:
            self._swept_at = self._clock()

    @property
    def is_due(self) -> bool:
        """Whether nobody has had the engine sweep for too long, or there is a reason to."""
        if self._swept_at is None:
            return False
        return self._clock() - self._swept_at > self._patience_s or self._is_wanted()


def install(interval_s: float) -> None:
    """Have vLLM's engines in this process wake up while they have nothing to do, whenever the
    connector's `IdleSweep.is_due`. To be called before they begin to run; twice is harmless.

    Args:
        interval_s: how often to look, in seconds.
    """
    for name in ("EngineCoreProc", "DPEngineCoreProc"):
        loops = getattr(engine_core, name, None)
        run = vars(loops).get("run_busy_loop") if loops is not None else None
        if run is not None and not hasattr(run, "is_woken"):
            setattr(loops, "run_busy_loop", _woken(run, interval_s))  # noqa: B010


def _woken(run: Callable[..., Any], interval_s: float) -> Callable[..., Any]:
    @wraps(run)
    def run_busy_loop(self: Any) -> Any:
        over = threading.Event()
        connector = engine_rpc.connector_of(self, _SWEEP)
        # One class's loop may run the other's.
        if connector is not None and not hasattr(self, "cachescope_is_woken"):
            self.cachescope_is_woken = True
            sweep: IdleSweep = getattr(connector, _SWEEP)
            wakeup = (EngineCoreRequestType.WAKEUP, None)
            sweep.begin(lambda: self.input_queue.put_nowait(wakeup))
            threading.Thread(
                target=_look, args=(self, sweep, min(interval_s, LOOK_S), over), daemon=True
            ).start()
        try:
            return run(self)
        finally:
            over.set()

    run_busy_loop.is_woken = True  # type: ignore[attr-defined]
    return run_busy_loop


def _look(core: Any, sweep: IdleSweep, interval_s: float, over: threading.Event) -> None:
    while not over.wait(interval_s):
        # One at a time: a step may take long.
        if sweep.is_due and core.input_queue.empty():
            sweep.wake()
