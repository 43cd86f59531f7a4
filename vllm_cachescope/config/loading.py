"""Reads the configuration: vLLM's ``kv_connector_extra_config``, and the file that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_cachescope.config.config import Config
from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.files import read_data
from vllm_cachescope.config.mistakes import describe


def load(extra_config: Mapping[str, Any]) -> Config:
    """Read the configuration from vLLM's ``kv_connector_extra_config``.

    Its keys are those of `Config`, or the one key ``config_file`` with a YAML or JSON file that
    holds them; keys beside ``config_file`` override the file. What the values refer to (files,
    organisations, stores) is left to `Config.check`.

    Raises:
        ConfigError: on an unknown key, a wrong type or an impossible value.
    """
    values = dict(extra_config)
    if (path := values.pop("config_file", None)) is not None:
        loaded = read_data(Path(str(path)), "config_file")
        if not isinstance(loaded, dict):
            raise ConfigError(f"config_file: {path} must hold a mapping of keys to values")
        values = _merged(loaded, values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, Config)) from None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``over`` in place of its own, at every depth."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged
