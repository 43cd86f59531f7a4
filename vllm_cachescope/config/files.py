"""The files that a configuration names."""

import json
from pathlib import Path
from typing import Any

import yaml

from vllm_cachescope.config.error import ConfigError


def read_text(path: Path, key: str) -> str:
    """Return the text of the file that ``key`` names.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from None


def read_data(path: Path, key: str) -> Any:
    """Return what the YAML or JSON file that ``key`` names holds.

    Raises:
        ConfigError: if the file cannot be read or parsed.
    """
    text = read_text(path, key)
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}: {path} is not valid: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """Return what ``error`` says in one line; a YAML error has several."""
    return " ".join(str(error).split())
