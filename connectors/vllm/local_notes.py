"""Where the API processes of one server keep notes on sessions for each other, if no tier has room
for them: a directory beside the machine's temporary files, which goes with the server."""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "cachescope-sessions"


def claim(base: Path | None = None) -> Path:
    """Return the directory of the server whose API process this is. The first process that ends
    removes it, as all end together; and those of servers that were killed are removed now.

    Args:
        base: where temporary files are; None for the system's own place.
    """
    base = Path(tempfile.gettempdir()) if base is None else base
    own = f"{_PREFIX}-{os.geteuid()}-"
    for other in base.glob(f"{own}*"):
        server = other.name.removeprefix(own)
        if server.isdigit() and not Path(f"/proc/{server}").exists():
            shutil.rmtree(other, ignore_errors=True)
    # All API processes of a server have one parent.
    path = base / f"{own}{os.getppid()}"
    atexit.register(_remove, path)
    return path


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path)
