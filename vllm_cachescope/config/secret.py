"""The secret, key of the scope keys and of every hash kept, and where secrets are read from."""

import os
import secrets
from pathlib import Path

from pydantic import SecretStr

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.files import read_text

SECRET_VARIABLE = "CACHESCOPE_SECRET"
"""Environment variable the secret is taken from where the configuration names none."""

OPERATOR_VARIABLE = "CACHESCOPE_OPERATOR_TOKEN"
"""Environment variable the operator's token is taken from where the configuration names none."""

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
    if secret is None and file is None and made_up_secret() is not None:
        return None
    chosen = secret_text(secret, file, "secret", SECRET_VARIABLE)
    return None if chosen is None else chosen.encode()


def secret_text(
    value: SecretStr | None, file: Path | None, key: str, variable: str, shortest: int = MIN_SECRET
) -> str | None:
    """Return the secret that ``key`` names, from the configuration, its file or the environment, in
    this order; None if there is none.

    Args:
        value: what the configuration itself holds.
        file: the file that ``{key}_file`` names.
        key: the key, for messages.
        variable: the environment variable.
        shortest: fewest characters.

    Raises:
        ConfigError: if the file cannot be read, or the secret is too short.
    """
    if value is not None:
        return value.get_secret_value()
    if file is not None:
        place, text = f"{key}_file: {file}", read_text(file, f"{key}_file").strip()
    elif text := os.environ.get(variable, ""):
        place = f"{key}: {variable}"
    else:
        return None
    if len(text) < shortest:
        raise ConfigError(f"{place} holds {len(text)} characters; allowed: {shortest} or more")
    return text
