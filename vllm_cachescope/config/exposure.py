"""Secrets where others can read them: on a command line, and in the settings that vLLM logs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.secret import OPERATOR_VARIABLE, SECRET_VARIABLE

_NAME = re.compile(r"secret|passw|credential|(^|_)token$|(access|api|private)_?key", re.IGNORECASE)
_NAMES_A_PLACE = re.compile(r"_(file|path|env)$")
_ADDRESS = re.compile(r":(?!//)\S*@|[?&]\w*password=")
"""An address with a password in it."""

_FILE = "a file of mode 600 that config_file names (--cachescope of cachescope serve)"
_INSTEAD = {
    "secret": f"secret_file, the variable {SECRET_VARIABLE}, or ",
    "operator_token": f"operator_token_file, the variable {OPERATOR_VARIABLE}, or ",
    "url": "password_file beside it, the variable CACHESCOPE_<NAME OF THE TIER>_PASSWORD (of the "
    "ledger CACHESCOPE_LEDGER_PASSWORD), or ",
}


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Make sure that settings which others can read hold no secret.

    Raises:
        ConfigError: if they do. The message names the keys and no value.
    """
    messages = [
        f"{key}: a secret may not stand where command lines and logs show it (value not shown); "
        f"allowed: {_INSTEAD.get(key.rpartition('.')[2], '')}{_FILE}"
        for key in secret_keys(settings)
    ]
    if messages:
        raise ConfigError("; ".join(messages))


def secret_keys(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of the secrets in settings, as in ``tiers.0.url``, whether or not there are
    such keys: a key that is misspelt holds a secret, too."""
    yield from _secret_keys(settings, ())


def _secret_keys(value: Any, key: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secret_keys(inner, (*key, str(name)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from _secret_keys(inner, (*key, str(number)))
    elif value is not None and key and _is_secret(value, key):
        yield ".".join(key)


def _is_secret(value: Any, key: tuple[str, ...]) -> bool:
    *_, name = key
    if _NAME.search(name) and not _NAMES_A_PLACE.search(name):
        return True
    # Elsewhere, such as in a pattern of `diffs.redact`, that may be anything.
    return key[0] in ("ledger", "tiers") and isinstance(value, str) and bool(_ADDRESS.search(value))
