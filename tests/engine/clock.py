"""A clock that tests set, and the connector that runs on it, in whatever process it lives."""

import mmap
import os
import struct
from pathlib import Path

from vllm_cachescope.connectors.vllm.engine.connector import CacheScopeConnector

VARIABLE = "CACHESCOPE_TEST_CLOCK"
"""Environment variable with the path of the file that holds the time."""


class Clock:
    """Seconds in a file that processes share; they pass only when they are told to.

    Args:
        path: the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(struct.pack("d", 1000.0))
        with open(path, "r+b") as file:
            self._time = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> float:
        return struct.unpack("d", self._time)[0]

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        struct.pack_into("d", self._time, 0, self() + seconds)


class DrivenConnector(CacheScopeConnector):
    """The product's connector, living on the tests' time."""

    def __init__(self, *args, **kwargs):
        self.clock = Clock(Path(os.environ[VARIABLE]))
        super().__init__(*args, **kwargs)
