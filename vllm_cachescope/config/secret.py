"""The secret: key of the scope keys and of every hash kept."""

import os
import secrets
from pathlib import Path

from pydantic import SecretStr

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.files import read_text

SECRET_VARIABLE = "CACHESCOPE_SECRET"
"""Environment variable the secret is taken from where the configuration names none."""

MIN_SECRET = 16
"""Fewest characters of the secret, and of the operator's token."""

_MADE_UP = "made-up-"  # starts a secret that no operator chose


def make_up_secret() -> None:
    """Put a random secret into the environment if it holds none.

    Processes started from this one inherit the secret; another server has another one.
    """
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = _MADE_UP + secrets.token_hex(32)


def made_up_secret() -> bytes | None:
    """Return the secret that `make_up_secret` put into the environment; None if it did not."""
    secret = os.environ.get(SECRET_VARIABLE, "")
    return secret.encode() if secret.startswith(_MADE_UP) else None


def chosen_secret(secret: SecretStr | None, file: Path | None) -> bytes | None:
    """Return the secret that the operator chose; None if the operator chose none.

    Args:
        secret: the secret in the configuration.
        file: the file it is in; without either, the environment counts.

    Raises:
        ConfigError: if the file cannot be read, or the secret is too short.
    """
    if secret is not None:
        return secret.get_secret_value().encode()
    if file is not None:
        return _long_enough(read_text(file, "secret_file").strip(), f"secret_file: {file}")
    variable = os.environ.get(SECRET_VARIABLE)
    if not variable or made_up_secret() is not None:
        return None
    return _long_enough(variable, f"secret: {SECRET_VARIABLE}")


def _long_enough(secret: str, place: str) -> bytes:
    if len(secret) < MIN_SECRET:
        raise ConfigError(f"{place} holds {len(secret)} characters; allowed: {MIN_SECRET} or more")
    return secret.encode()
