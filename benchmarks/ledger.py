"""What the ledger costs a request: prompts of 8,000 tokens that the device cache holds, on servers
with the plugin, without and with a ledger, side by side; and the work on each record by itself.

Servers of a pair differ by some percent however alike they are, so the target is about the CPU time
of the work itself, next to that of such a request.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import URL

from benchmarks.harness import Result, arguments, console, finish, server
from benchmarks.overhead import add_rates, compare_rates, filled
from vllm_cachescope.api.recorder import Recorder
from vllm_cachescope.api.request_context import PromptTiming, RequestContext
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.config import LedgerSettings
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.usage.batch import Batch
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import Store
from vllm_cachescope.usage.usage_ledger import retention_of

RECORDS = 5000
A_SECOND = 100
"""Requests in one batch: a server's in a second."""

REPORT = Report(
    (
        Row("read_device", Scope.ORG, 3600, 4096),
        Row("read_device", Scope.SESSION, 300, 3840),
        Row("uncached", Scope.SESSION, 0, 60),
    ),
    engine=EngineId(0, "an epoch"),
    prefill_seconds_saved=1.5,
)


def context(number: int) -> RequestContext:
    """Return a request that is over, of one of 40 sessions of 8 organisations."""
    made = RequestContext(Caller(f"name:{number % 8}", f"session {number % 40}"))
    made.reports["nonce"] = REPORT
    made.timings["nonce"] = PromptTiming([], 7936, 7936, 0.0, 0.1, output_tokens=8)
    return made


def cpu_us(work: Callable[[], object], records: int) -> float:
    """Return the CPU time of this thread that ``work`` takes for each of ``records`` records, in
    microseconds."""
    start = time.thread_time()
    work()
    return 1e6 * (time.thread_time() - start) / records


def record_us() -> tuple[float, list[RequestRecord]]:
    """Return how long the event loop is held for a record, and the records."""
    made: list[RequestRecord] = []
    recorder = Recorder("model", "replica")
    recorder.add_sink(lambda record, _: made.append(record))
    contexts = [context(number) for number in range(RECORDS)]

    def record() -> None:
        for one in contexts:
            recorder.record(one, None, "chatcmpl-0123456789abcdef")

    return cpu_us(record, RECORDS), made


def write_us(records: list[RequestRecord]) -> float:
    """Return how much CPU time the writing of a record takes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        engine = connect(URL.create("sqlite", database=str(path / "usage.db")))
        store = Store(engine, retention_of(LedgerSettings(directory=path)))
        store.create()
        limits = NameLimits()

        def write() -> None:
            for start in range(0, RECORDS, A_SECOND):
                store.write(Batch.of(records[start : start + A_SECOND], limits))

        took = cpu_us(write, RECORDS)
        engine.dispose()
    return took


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("ledger", options.quick)
    console.print("ledger: pairs of servers, without and with a ledger")
    rates, on_loop, on_thread = [], [], []
    for number in range(options.pairs):
        with tempfile.TemporaryDirectory() as directory:
            kept = {"directory": str(Path(directory) / "ledger")}
            with filled(server(True), server(True, ledger=kept), first=number) as clients:
                rates.append(compare_rates(clients))
        made_us, records = record_us()
        on_loop.append(made_us)
        on_thread.append(write_us(records))
    result.add("a record, on the event loop", on_loop, "µs")
    result.add("a record, on the ledger's thread", on_thread, "µs")
    request_us = 1e6 * statistics.median(plain.cpu_s for plain, _ in rates)
    result.add("a request, CPU time of the server", [1e3 * a.cpu_s for a, _ in rates], "ms")
    result.add(
        "both over a request",
        [100 * (a + b) / request_us for a, b in zip(on_loop, on_thread, strict=True)],
        "%",
        "at most 0.5 %",
        lambda share: share <= 0.5,
    )
    add_rates(result, rates, "no ledger", "ledger", least=0.97)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
