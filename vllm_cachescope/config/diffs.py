"""The settings of diffs: where they are written, how many are kept, what they leave out."""

from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field

from vllm_cachescope.config.private_directory import check_private_directory
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
        check_private_directory(self.directory, "diffs.directory")
