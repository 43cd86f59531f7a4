"""What the fork server of `tests.engine.forks` imports: vLLM as far as an engine or an API server
needs it, and nothing of this project, so that a fork can be a server without the plugin."""

import contextlib
import gc
import importlib

_MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
)

for _name in _MODULES:
    # Another release of vLLM may have it elsewhere; its engines import it then by themselves.
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

# A fork need not look through these objects again, of which there are a million.
gc.collect()
gc.freeze()
