"""The settings of diffs: where they are written, how many are kept, what they leave out."""

import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.values import Model, Pattern


class DiffSettings(Model):
    """Diffs of the tools and system blocks that broke a prefix.

    Attributes:
        directory: where they are written, readable to nobody but the server. It is made if it is
            not there.
        max_bytes: bytes that the directory may hold; the oldest files are removed first.
        max_files: files that the directory may hold.
        redact: regular expressions of text that is left out of diffs, besides what looks like a
            key, a token, a password or an e-mail address.
    """

    directory: Path
    max_bytes: Annotated[ByteSize, Field(ge=2**12)] = ByteSize(2**24)
    max_files: Annotated[int, Field(strict=True, gt=0)] = 1000
    redact: tuple[Pattern, ...] = ()

    def check(self) -> None:
        """Check that the directory can be used, or made if it is not there.

        Raises:
            ConfigError: if the directory can be neither used nor made.
        """
        key = f"diffs.directory: {self.directory}"
        try:
            if not self.directory.exists():
                parent = next(one for one in self.directory.absolute().parents if one.exists())
                if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                    raise ConfigError(f"{key} cannot be made: {parent} cannot be written to")
                return
            mode = stat.S_IMODE(self.directory.stat().st_mode)
        except OSError as error:
            raise ConfigError(f"{key} cannot be made: {error}") from None
        if not self.directory.is_dir():
            raise ConfigError(f"{key} cannot be made: there is a file of that name")
        if mode & 0o077:
            raise ConfigError(f"{key} is open to others (mode {mode:o}); allowed: 700")
        if not os.access(self.directory, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"{key} cannot be written to")
