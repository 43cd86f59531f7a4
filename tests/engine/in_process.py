"""vLLM's engine in this process, on one thread, to be stepped by hand."""

import os
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What vLLM reads when it is imported, or when an engine starts."""


def start(model: Path, **options: Any) -> Any:
    """Return an engine that has started; everything that reads the environment comes before.

    Args:
        model: the model's directory.
        options: further engine arguments.
    """
    os.environ |= ENVIRONMENT
    import torch
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # The model is so small that threads would mostly wait for each other.
    torch.set_num_threads(1)
    arguments = EngineArgs(model=str(model), dtype="float32", enforce_eager=True, **options)
    return LLMEngine.from_engine_args(arguments)
