"""The memory that the CPU tier takes: shared memory, of which there must be enough at start."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.connectors.vllm.findings import Finding, Status

SHARED = Path("/dev/shm")

_LARGER = "a larger /dev/shm (docker --shm-size, or an emptyDir of medium Memory)"


@dataclass(frozen=True, slots=True)
class Room:
    """One limit of the memory that the CPU tier is part of.

    Attributes:
        name: what has the limit.
        total: bytes in all.
        free: bytes that can still be taken.
    """

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory there is.

    Attributes:
        shared: shared memory. It cannot hold more than is free.
        others: what else limits it. They may give more than is free now, by taking it from others.
    """

    shared: Room
    others: tuple[Room, ...]


def measure(shared: Path = SHARED, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Memory:
    """Return how much memory there is, without what a killed engine has left.

    Args:
        shared: the directory of shared memory.
        proc: where Linux tells of processes and memory.
        sys: where Linux tells of control groups.
    """
    found = os.statvfs(shared)
    stale = shm_regions.stale_bytes(shared)
    free = found.f_bavail * found.f_frsize + stale
    rooms = [_machine(proc), *_groups(proc, sys)]
    return Memory(Room(str(shared), found.f_blocks * found.f_frsize, free), tuple(rooms))


def _machine(proc: Path) -> Room:
    lines = (line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    kibibytes = {name: int(value.split()[0]) for name, value in lines}
    return Room(
        "the machine", kibibytes["MemTotal"] * 1024, kibibytes.get("MemAvailable", 0) * 1024
    )


def _groups(proc: Path, sys: Path) -> Iterator[Room]:
    """Yield the control group of this process, and those around it, that have a limit."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, names = sys / "fs/cgroup/memory", ("limit_in_bytes", "usage_in_bytes")
        elif not controllers:
            root, names = sys / "fs/cgroup", ("max", "current")
        else:
            continue
        # Inside a container its own group is at the root, and the path may name nothing.
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(root) and (room := _group(group, *names)) is not None:
                yield room


def _group(group: Path, limit: str, usage: str) -> Room | None:
    try:
        text = (group / f"memory.{limit}").read_text().strip()
        used = int((group / f"memory.{usage}").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if text == "max" or int(text) >= 1 << 60:
        return None
    # Files that are only cached make room.
    cached = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    return Room("the memory limit of this container", int(text), int(text) - used + cached)


def check(cpu_bytes: int, engines: int, memory: Memory) -> Finding:
    """Return whether the CPU tiers of all engines on this machine fit into its memory.

    Args:
        cpu_bytes: size of one engine's CPU tier, in bytes.
        engines: how many engines there are on this machine.
        memory: what there is.
    """
    needed = cpu_bytes * engines
    what = shown(needed) if engines == 1 else f"{engines} × {shown(cpu_bytes)}"
    for room in (memory.shared, *memory.others):
        fits = room.free if room is memory.shared else room.total
        if needed > fits:
            remedy = f"{shown(fits // engines)} or less"
            if room is memory.shared and needed <= min(it.total for it in memory.others):
                remedy = f"{remedy}, or {_LARGER}"
            return Finding(
                "cpu_bytes", Status.FAILURE, f"{what} does not fit: {_has(room)}", remedy
            )
    for room in memory.others:
        if needed > room.free:
            found = f"{what} is more than is available now: {_has(room)}"
            remedy = f"{shown(max(room.free, 0) // engines)} or less, or more that is free"
            return Finding("cpu_bytes", Status.WARNING, found, remedy)
    return Finding("cpu_bytes", Status.OK, f"{what} fits: {_has(memory.shared)}")


def _has(room: Room) -> str:
    return f"{room.name} has {shown(room.free)} free of {shown(room.total)}"


def shown(count: int) -> str:
    """Return a number of bytes as one reads it, as in ``1.5 GiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
