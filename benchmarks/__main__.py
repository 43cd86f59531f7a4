"""``python -m benchmarks [--quick] [--pairs N]``: every benchmark, one after the other."""

import os
import subprocess
import sys

from benchmarks import summary
from benchmarks.harness import arguments

BENCHMARKS = (
    "agent_replay",
    "boundaries",
    "burst",
    "burst_crowd",
    "cpu_tier",
    "diagnosis",
    "disk_tier",
    "envelopes",
    "explain",
    "gateway",
    "kv_events",
    "ledger",
    "metrics",
    "neighbours",
    "overhead",
    "policy",
    "remote_tier",
    "report",
    "scale",
    "shared_prefix",
)


def main() -> int:
    """Run them all with the arguments given, and summarise what they found; return 1 if any missed
    a target or failed."""
    options = arguments(__doc__ or "")
    # vLLM's front end, which one of them runs in its own process, is talkative.
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    failed = []
    for name in BENCHMARKS:
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
        if subprocess.run(command, env=environment).returncode != 0:
            failed.append(name)
    print(f"All figures: {summary.write(options.results)}")
    if failed:
        print(f"Missed a target or failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
