"""The files with secrets in them, which nobody but the server should read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_cachescope.config import Config
from vllm_cachescope.config.exposure import secret_keys
from vllm_cachescope.config.files import open_mode, read_data
from vllm_cachescope.connectors.vllm.findings import Finding, Status


def check(extra_config: Mapping[str, Any], config: Config) -> Iterator[Finding]:
    """Yield for each file with secrets in it whether others can read it.

    Args:
        extra_config: vLLM's ``kv_connector_extra_config``.
        config: the configuration that was read from it.

    Raises:
        OSError: if a file has gone since.
    """
    for key, path in _files(extra_config, config).items():
        mode = open_mode(path)
        if mode is None:
            yield Finding(key, Status.OK, f"{path} is private")
        else:
            yield Finding(
                key,
                Status.WARNING,
                f"{path} holds a secret and is open to others (mode {mode:o})",
                f"600 or 640, as of chmod 600 {path}",
            )


def _files(extra_config: Mapping[str, Any], config: Config) -> dict[str, Path]:
    files = config.secret_files()
    if (named := extra_config.get("config_file")) is not None:
        path = Path(str(named))
        if any(secret_keys(read_data(path, "config_file"))):
            files["config_file"] = path
    return files
