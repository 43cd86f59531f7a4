"""The files that a configuration names."""

import json
import stat
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
        raise ConfigError(f"{key}: {path} is not valid: {problem(error)}") from None


def problem(error: Exception) -> str:
    """Return what ``error`` says in one line, and where. A YAML error also quotes the text, which
    may be a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


def open_mode(path: Path) -> int | None:
    """Return the mode of a file that others can read, or its group can write; None of one that is
    private.

    Raises:
        OSError: if there is no such file.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    return mode if mode & 0o027 else None
