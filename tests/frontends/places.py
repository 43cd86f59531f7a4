"""Where `scripts/frontends.sh` has put the front ends, and how they are started."""

from pathlib import Path

import pytest
from vllm.version import __version__

from tests.engine.server import MODEL, ONE_PROCESS, ROOT, plugin

ENGINE = __version__.partition("+")[0]
PINNED = "0.32.0"
"""The vLLM of `make test`. Each has a Rust server of its own, which starts with no other engine."""

FRONT_ENDS = ROOT / ".cache" / "frontends"
GRPC = FRONT_ENDS / "grpc" / "bin" / "python"
RUST = FRONT_ENDS / ("vllm-rs" if ENGINE == PINNED else f"vllm-rs-{ENGINE}")
DYNAMO = FRONT_ENDS / "dynamo" / "bin" / "python"


def needs(program: Path) -> pytest.MarkDecorator:
    """Return a mark that skips tests where ``program`` is not installed."""
    return pytest.mark.skipif(
        not program.exists(), reason=f"needs {program.name}: run make frontends"
    )


def options(model: Path, *further: str, **config: object) -> list[str]:
    """Return what ``vllm serve`` is given in these tests, with the plugin; see `plugin`."""
    return [
        *("--model", str(model), "--served-model-name", MODEL),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
        *("--num-gpu-blocks-override", "40", "--max-num-seqs", "8"),
        *ONE_PROCESS,
        *plugin(**config),
        *further,
    ]
