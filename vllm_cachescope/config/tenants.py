"""The names of organisations by the SHA-256 of their API keys."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter, ValidationError

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.files import read_data
from vllm_cachescope.config.mistakes import describe


def _digest(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(
            f"{len(text)} characters are not the SHA-256 of an API key: write 64 lower-case hex "
            "digits"
        )
    return text


Tenants = dict[Annotated[str, AfterValidator(_digest)], str]
"""Names by digests of 64 lower-case hex digits."""

_TENANTS: TypeAdapter[dict[str, str]] = TypeAdapter(Tenants)


def read_tenants(path: Path) -> dict[str, str]:
    """Return the mapping in the file that ``tenants_file`` names.

    Raises:
        ConfigError: if the file cannot be read or does not hold such a mapping.
    """
    try:
        return _TENANTS.validate_python(read_data(path, "tenants_file"))
    except ValidationError as error:
        raise ConfigError(describe(error, prefix=("tenants_file",))) from None
