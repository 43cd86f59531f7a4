"""The peer: vLLM's own tiering with its own policies; only what copies on a CPU is the plugin's."""

import json

from benchmarks import harness
from benchmarks.cpu_tiering import CpuTieringSpec
from demo.server import Server


def engine(policy: str, cpu_bytes: int, *arguments: str) -> Server:
    """Return a plain vLLM that offloads to memory.

    Args:
        policy: vLLM's eviction policy, ``lru`` or ``arc``.
        cpu_bytes: the memory.
        arguments: further ones for vLLM.
    """
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": CpuTieringSpec.__name__,
            "spec_module_path": CpuTieringSpec.__module__,
            "cpu_bytes_to_use": cpu_bytes,
            "eviction_policy": policy,
        },
    }
    return harness.server(False, "--kv-transfer-config", json.dumps(transfer), *arguments)
