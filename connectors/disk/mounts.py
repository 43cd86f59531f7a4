"""The file system that a directory is on, as far as the system tells."""

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")

REMOTE = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
    *("glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "smb3", "smbfs", "virtiofs"),
)
"""The types of file systems that other machines may have mounted, too."""


def type_of(path: Path) -> str | None:
    """Return the type of the file system that ``path`` is on, or will be once it is made; None if
    that cannot be told."""
    real = os.path.realpath(path)
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    found: tuple[int, str] | None = None
    for line in lines:
        # The optional fields in the middle end with a dash; see proc(5).
        front, _, back = line.partition(" - ")
        mount = front.split()[4].encode().decode("unicode_escape")
        is_below = real == mount or real.startswith(mount.rstrip("/") + "/")
        # The last one mounted at a place hides the others.
        if is_below and (found is None or len(mount) >= found[0]):
            found = len(mount), back.split()[0]
    return None if found is None else found[1]
