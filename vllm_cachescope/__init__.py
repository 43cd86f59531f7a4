"""Scoped prompt caching with TTLs, usage and diagnosis for a self-hosted vLLM.

From Python, recorded traffic is read with `read_traffic` and looked into with `explain` and
`lint`; ``__version__`` is the version of the installed package. Everything else is reached
through vLLM (``--kv-transfer-config``) or the command ``cachescope``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_cachescope.cli.explanation import explain
    from vllm_cachescope.cli.lint_rules import lint
    from vllm_cachescope.cli.traffic import read_traffic

    __version__: str

__all__ = ["__version__", "explain", "lint", "read_traffic"]

_MODULES = {"explain": "cli.explanation", "lint": "cli.lint_rules", "read_traffic": "cli.traffic"}


def __getattr__(name: str) -> Any:
    # vLLM imports this package in each of its processes, most of which need none of these.
    if name == "__version__":
        return import_module("importlib.metadata").version("vllm-cachescope")
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
