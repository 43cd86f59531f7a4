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

_SWEEP = "idle_sweep"
"""The connector's attribute."""


class IdleSweep:
    """Says when an engine has to sweep by itself. Its time is the machine's, not the ledger's.

    Args:
        interval_s: how often an idle engine sweeps, in seconds.
        clock: seconds, never running backwards.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        # Whoever asks for sweeps at this interval is never quite on time.
        self._patience_s = 1.5 * interval_s
        self._clock = clock
        self._swept_at: float | None = None

    def begin(self) -> None:
        """The engine runs a loop of its own, which can be woken."""
        self._swept_at = self._clock()

    def note(self) -> None:
        """The engine sweeps."""
        if self._swept_at is not None:
            self._swept_at = self._clock()

    @property
    def is_due(self) -> bool:
        """Whether nobody has had the engine sweep for too long."""
        return self._swept_at is not None and self._clock() - self._swept_at > self._patience_s


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
            sweep.begin()
            threading.Thread(
                target=_wake, args=(self, sweep, interval_s, over), daemon=True
            ).start()
        try:
            return run(self)
        finally:
            over.set()

    run_busy_loop.is_woken = True  # type: ignore[attr-defined]
    return run_busy_loop


def _wake(core: Any, sweep: IdleSweep, interval_s: float, over: threading.Event) -> None:
    while not over.wait(interval_s):
        # One at a time: a step may take long.
        if sweep.is_due and core.input_queue.empty():
            core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
