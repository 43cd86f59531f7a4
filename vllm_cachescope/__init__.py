"""Scoped prompt caching with TTLs, usage and diagnosis for a self-hosted vLLM.

From Python, prompts for vLLM's `LLM` and `AsyncLLM` are marked and run with `PromptCache` and
`AsyncPromptCache`; recorded traffic is read with `read_traffic` and looked into with `explain`
and `lint`; ``__version__`` is the version of the installed package. Everything else is reached
through vLLM (``--kv-transfer-config``) or the command ``cachescope``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_cachescope.cache.report import Report
    from vllm_cachescope.cli.explaining import explain
    from vllm_cachescope.cli.lint_rules import lint
    from vllm_cachescope.cli.traffic import read_traffic
    from vllm_cachescope.connectors.vllm.offline.async_prompt_cache import AsyncPromptCache
    from vllm_cachescope.connectors.vllm.offline.cached_output import CachedOutput
    from vllm_cachescope.connectors.vllm.offline.prompt_cache import PromptCache
    from vllm_cachescope.prompt.marked_prompt import Breakpoint, Cached, Conversation, Prompt

    __version__: str

__all__ = [
    "AsyncPromptCache",
    "Breakpoint",
    "Cached",
    "CachedOutput",
    "Conversation",
    "Prompt",
    "PromptCache",
    "Report",
    "__version__",
    "explain",
    "lint",
    "read_traffic",
]

_MARKED_PROMPT = "prompt.marked_prompt"
_OFFLINE = "connectors.vllm.offline"
_MODULES = {
    "AsyncPromptCache": f"{_OFFLINE}.async_prompt_cache",
    "Breakpoint": _MARKED_PROMPT,
    "Cached": _MARKED_PROMPT,
    "CachedOutput": f"{_OFFLINE}.cached_output",
    "Conversation": _MARKED_PROMPT,
    "Prompt": _MARKED_PROMPT,
    "PromptCache": f"{_OFFLINE}.prompt_cache",
    "Report": "cache.report",
    "explain": "cli.explaining",
    "lint": "cli.lint_rules",
    "read_traffic": "cli.traffic",
}


def __getattr__(name: str) -> Any:
    # vLLM imports this package in each of its processes, most of which need none of these.
    if name == "__version__":
        return import_module("importlib.metadata").version("vllm-cachescope")
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
