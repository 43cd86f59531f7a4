"""What a killed engine leaves in shared memory goes at the next start, and nothing else does."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from vllm_cachescope.connectors.vllm import shm_regions

ENGINE = """
import sys, time
from pathlib import Path
from vllm_cachescope.connectors.vllm import shm_regions
claimed = shm_regions.claim(sys.argv[2], Path(sys.argv[1]))
Path(sys.argv[1], f"vllm_offload_{sys.argv[2]}.mmap").write_bytes(bytes(4096))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that holds a region in ``tmp_path`` as an engine does."""
    processes = []

    def start(engine_id):
        process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(tmp_path), engine_id], stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_killed_engines_region_is_removed_and_a_live_ones_is_not(tmp_path, start):
    killed, live = start("cachescope-killed"), start("cachescope-live")
    everything = names(tmp_path)
    assert len(everything) == 4
    assert shm_regions.remove_stale(tmp_path) == []
    assert names(tmp_path) == everything

    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert shm_regions.remove_stale(tmp_path) == [tmp_path / "vllm_offload_cachescope-killed.mmap"]
    assert names(tmp_path) == [
        "vllm_offload_cachescope-live.lock",
        "vllm_offload_cachescope-live.mmap",
    ]
    assert live.poll() is None


def test_a_region_stays_while_any_process_of_its_engine_lives(tmp_path, start):
    scheduler, worker = start("cachescope-parallel"), start("cachescope-parallel")
    for process, expected in ((scheduler, []), (worker, ["vllm_offload_cachescope-parallel.mmap"])):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert [path.name for path in shm_regions.remove_stale(tmp_path)] == expected
    assert names(tmp_path) == []


def test_other_peoples_files_stay(tmp_path):
    for name in (
        "vllm_offload_1234.mmap",
        "vllm_offload_1234.lock",
        "cachescope-1.mmap",
        "psm_cachescope",
    ):
        (tmp_path / name).write_bytes(b"x")
    before = names(tmp_path)
    assert shm_regions.remove_stale(tmp_path) == []
    assert names(tmp_path) == before


@pytest.mark.parametrize("kind", ["FIFO", "link", "directory", "socket"])
def test_what_others_put_in_the_way_of_a_lock_stops_nothing(tmp_path, kind):
    path = tmp_path / f"vllm_offload_{shm_regions.PREFIX}trap.lock"
    target = tmp_path / "another's file"
    target.write_bytes(b"kept")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "directory":
        path.mkdir()
    elif kind == "another's":
        if os.geteuid():
            pytest.skip("only root can make a file of another user")
        path.touch()
        os.chown(path, 12345, 12345)
    else:
        with closing(socket.socket(socket.AF_UNIX)) as trap:
            trap.bind(str(path))
    region = tmp_path / f"vllm_offload_{shm_regions.PREFIX}stale.mmap"
    region.write_bytes(b"KV")
    region.with_suffix(".lock").touch()
    # Neither of the two waits, and the rest is looked after.
    assert shm_regions.remove_stale(tmp_path) == [region]
    with pytest.raises(OSError, match="trap"):
        shm_regions.claim(f"{shm_regions.PREFIX}trap", tmp_path)
    assert target.read_bytes() == b"kept" and os.path.lexists(path)


def test_every_file_of_a_region_goes(tmp_path):
    for suffix in ("lock", "mmap", "mmap.0", "mmap.1"):
        (tmp_path / f"vllm_offload_cachescope-x.{suffix}").write_bytes(b"x")
    assert len(shm_regions.remove_stale(tmp_path)) == 3
    assert names(tmp_path) == []


def test_an_engine_that_ends_in_order_leaves_nothing(tmp_path):
    claimed = shm_regions.claim("cachescope-orderly", tmp_path)
    region = tmp_path / "vllm_offload_cachescope-orderly.mmap"
    region.write_bytes(b"x")
    region.unlink()
    shm_regions.release(claimed)
    assert names(tmp_path) == []


def test_what_an_engine_could_not_remove_is_found_later(tmp_path):
    claimed = shm_regions.claim("cachescope-late", tmp_path)
    (tmp_path / "vllm_offload_cachescope-late.mmap").write_bytes(b"x")
    assert shm_regions.remove_stale(tmp_path) == []
    shm_regions.release(claimed)
    assert len(shm_regions.remove_stale(tmp_path)) == 1
    assert names(tmp_path) == []


@pytest.mark.engine
def test_the_real_engine_holds_its_claim(engine):
    from vllm_cachescope.connectors.vllm.engine.offloading import region_path

    manager = engine.connector.connector_scheduler.manager
    region = Path(region_path(manager))
    assert region.exists()
    # As an engine that starts beside it would.
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vllm_cachescope.connectors.vllm import shm_regions; shm_regions.remove_stale()",
        ],
        check=True,
    )
    assert found.returncode == 0
    assert region.exists()


def test_a_claim_holds_whatever_others_remove_meanwhile(tmp_path):
    stopping = threading.Event()

    def remove():
        while not stopping.is_set():
            shm_regions.remove_stale(tmp_path)

    removers = [threading.Thread(target=remove) for _ in range(2)]
    for remover in removers:
        remover.start()
    try:
        for number in range(300):
            claimed = shm_regions.claim(f"{shm_regions.PREFIX}{number}", tmp_path)
            region = Path(claimed.name).with_suffix(".mmap")
            region.write_bytes(b"")
            shm_regions.remove_stale(tmp_path)
            assert region.exists() and Path(claimed.name).exists()
            claimed.close()
    finally:
        stopping.set()
        for remover in removers:
            remover.join()


def test_a_region_claimed_anew_while_its_old_lock_was_being_looked_at_stays(tmp_path, monkeypatch):
    shm_regions.claim("cachescope-again", tmp_path).close()  # Its engine is killed.
    region = tmp_path / "vllm_offload_cachescope-again.mmap"
    held = []
    lock_file = fcntl.flock

    def others_were_faster(lock, operation):
        monkeypatch.setattr(shm_regions.fcntl, "flock", lock_file)
        shm_regions.remove_stale(tmp_path)
        held.append(shm_regions.claim("cachescope-again", tmp_path))
        region.write_bytes(b"x")
        lock_file(lock, operation)

    monkeypatch.setattr(shm_regions.fcntl, "flock", others_were_faster)
    assert shm_regions.remove_stale(tmp_path) == []
    assert region.exists() and Path(held[0].name).exists()
    held[0].close()
