import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disk.side import DiskSide
from tests.redis.wall import Wall
from vllm_cachescope.connectors.disk import upkeep


@pytest.fixture(autouse=True)
def busy_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants to wait for it here."""
    monkeypatch.setattr(upkeep, "PAUSE_S", 0.05)


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a tier, which is not there yet."""
    return tmp_path / "tier"


@pytest.fixture
def start_side(wall: Wall) -> Iterator[Callable[..., DiskSide]]:
    sides: list[DiskSide] = []

    def start(path: Path, **options: object) -> DiskSide:
        sides.append(DiskSide(path, **{"wall": wall, **options}))
        return sides[-1]

    yield start
    for side in sides:
        side.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a directory on a file system of its own, of so many bytes."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs to mount a file system")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
