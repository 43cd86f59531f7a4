"""A real PostgreSQL server of the tests."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_USER = "postgres"  # it refuses to run as root


def programs() -> Path | None:
    """Return the directory of its programs; None where it is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@contextmanager
def serve() -> Iterator[str]:
    """Run a server; yield an address of SQLAlchemy's."""
    bin_ = programs()
    assert bin_ is not None
    user = _USER if os.geteuid() == 0 else None
    # Not in pytest's own directory, which it keeps from other users.
    scratch = Path(tempfile.mkdtemp(prefix="cachescope-postgres-"))
    if user is not None:
        shutil.chown(scratch, user)
    data = scratch / "data"
    quiet = {"user": user, "stdout": subprocess.DEVNULL, "cwd": scratch, "check": True}
    subprocess.run([bin_ / "initdb", "-D", data, "-A", "trust", "-U", _USER, "-N"], **quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories= -p {port} -F"
    control = [bin_ / "pg_ctl", "-D", data, "-w", "-l", scratch / "log"]
    subprocess.run([*control, "-o", options, "start"], **quiet)
    try:
        yield f"postgresql+psycopg://{_USER}@127.0.0.1:{port}/{_USER}"
    finally:
        subprocess.run([*control, "-m", "fast", "-t", "120", "stop"], **quiet)
        shutil.rmtree(scratch)
