"""A directory for what only the server may read."""

import os
import stat
from pathlib import Path

from vllm_cachescope.config.error import ConfigError


def check_private_directory(directory: Path, key: str) -> None:
    """Check that such a directory can be used, or made if it is not there.

    Raises:
        ConfigError: if it can be neither used nor made. The message begins with ``key``.
    """
    place = f"{key}: {directory}"
    try:
        if not directory.exists():
            parent = next(one for one in directory.absolute().parents if one.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise ConfigError(f"{place} cannot be made: {parent} cannot be written to")
            return
        mode = stat.S_IMODE(directory.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{place} cannot be made: {error}") from None
    if not directory.is_dir():
        raise ConfigError(f"{place} cannot be made: there is a file of that name")
    if mode & 0o077:
        raise ConfigError(f"{place} is open to others (mode {mode:o}); allowed: 700")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"{place} cannot be written to")
