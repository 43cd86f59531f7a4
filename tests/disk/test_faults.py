"""What is wrong with a disk, its files or its index is never more than a miss."""

import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.disk.side import FILE, DiskSide, files, index
from tests.redis.engine_side import SLOT, content, keys
from tests.redis.servers import wait_until
from vllm_cachescope.connectors.disk import upkeep
from vllm_cachescope.connectors.disk.directory import Directory
from vllm_cachescope.connectors.disk.index import Index
from vllm_cachescope.tiers.envelope import HEADER_BYTES


def damage(path: Path, offset: int) -> None:
    """Change a bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def counted(side: DiskSide, operation: str, outcome: str) -> int:
    """Return how many keys were counted since the last time. Asks something, for that to show."""
    side.get(keys(1, "asked"))
    return side.tier.take_stats()[operation, outcome]


@pytest.mark.parametrize("offset", [0, 30, HEADER_BYTES, HEADER_BYTES + SLOT - 1])
def test_a_damaged_file_is_a_miss_counted_and_deleted(place, start_side, offset):
    side = start_side(place)
    side.put(keys(1))
    damage(files(place)[0], offset)
    loaded = side.get(keys(1))
    assert loaded.keys == {} and not files(place)
    assert side.tier.take_stats()["load", "damaged"] == 1
    side.put(keys(1))
    assert set(side.get_exact(keys(1)).keys) == set(keys(1))


@pytest.mark.parametrize("kind", ["short", "long", "empty", "a link", "a directory", "another's"])
def test_what_is_no_value_is_not_read(tmp_path, place, start_side, kind):
    side = start_side(place)
    side.put(keys(2))
    file = files(place)[0]
    whole = file.read_bytes()
    if kind == "short":
        file.write_bytes(whole[:-1])
    elif kind == "long":
        file.write_bytes(whole + b"x")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "another's":
        if os.geteuid():
            pytest.skip("needs to give a file away")
        os.chown(file, 12345, 12345)
    else:
        file.unlink()
        (tmp_path / "secret").write_bytes(whole)
        file.symlink_to(tmp_path / "secret") if kind == "a link" else file.mkdir()
    assert len(side.get_exact(keys(2)).keys) == 1
    assert kind != "a link" or (tmp_path / "secret").read_bytes() == whole
    assert side.tier.usable
    side.put(keys(2))
    assert len(side.get_exact(keys(2)).keys) == 2


def test_values_that_were_swapped_are_damaged(place, start_side):
    side = start_side(place)
    side.put(keys(2))
    one, other = files(place)
    swapped = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(swapped)
    assert side.get(keys(2)).keys == {}
    assert side.tier.take_stats()["load", "damaged"] == 2


def test_a_lease_that_nobody_granted_does_not_count(place, start_side, wall):
    side = start_side(place)
    side.put(keys(2), ttl_s=300)
    with sqlite3.connect(index(place)) as database:
        database.execute("UPDATE entries SET ends_ms = ends_ms + 3600000")
    wall.advance(301)
    assert side.get(keys(2)).keys == {}
    assert side.tier.take_stats()["load", "damaged"] == 2


def test_a_file_that_is_gone_is_a_miss_and_can_be_stored_again(place, start_side):
    side = start_side(place)
    side.put(keys(3))
    for file in files(place)[:2]:
        file.unlink()
    assert len(side.get_exact(keys(3)).keys) == 1
    side.put(keys(3))
    assert len(side.get_exact(keys(3)).keys) == 3


def test_half_written_files_and_lost_ones_are_repaired_at_the_start_and_counted(place, start_side):
    first = start_side(place)
    first.put(keys(5))
    first.close()
    whole = files(place)
    (whole[0].parent / "abcdefabcdef-0").write_bytes(b"half of a val")
    (whole[0].parent / "junk").write_bytes(b"")
    whole[0].unlink()
    side = start_side(place)
    wait_until(lambda: set(files(place)) == set(whole[1:]))
    wait_until(lambda: counted(side, "reclaim", "damaged") == 3)
    assert side.tier.health()["used_bytes"] <= 5 * FILE
    assert len(side.get_exact(keys(5)).keys) == 4


def test_what_a_live_engine_is_writing_is_left_alone(place, start_side, monkeypatch):
    monkeypatch.setattr(upkeep, "REPAIR_S", 0.05)
    writing = start_side(place).new_store()
    writing.connect(time.monotonic() + 1)
    file = writing.backend.new_file()
    writing.backend.directory.write(file, b"half", memoryview(b"of a value"))
    side = start_side(place)
    side.put(keys(3))
    time.sleep(0.3)
    assert len(files(place)) == 4
    writing.close()
    wait_until(lambda: len(files(place)) == 3)


def _write_for_ever(place: Path, number: int, pipe: Connection) -> None:
    side = DiskSide(place, wall=time.time)
    pipe.send("ready")
    pipe.recv()
    for i in range(10**6):
        side.put(keys(20, f"prompt {number} {i}"))


def test_engines_that_are_killed_while_they_write_leave_only_whole_entries(place, start_side):
    side = start_side(place, wall=time.time)
    spawning = multiprocessing.get_context("spawn")
    pipes = [multiprocessing.Pipe() for _ in range(3)]
    processes = [
        spawning.Process(target=_write_for_ever, args=(place, i, remote), daemon=True)
        for i, (_, remote) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for round_, ((pipe, _), process) in enumerate(zip(pipes, processes, strict=True)):
        assert pipe.recv() == "ready"
        pipe.send("go")
        time.sleep(0.1 + 0.03 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        # Others go on at once.
        side.put(keys(3, f"mine {round_}"))
        assert len(side.get_exact(keys(3, f"mine {round_}")).keys) == 3
    with sqlite3.connect(index(place)) as database:
        named = {Path(row[0]).name for row in database.execute("SELECT file FROM entries")}
    assert len(named) > 12
    fresh = start_side(place, wall=time.time)
    wait_until(lambda: {file.name for file in files(place)} == named)
    prompts = [keys(20, f"prompt {number} {i}") for number in range(3) for i in range(4)]
    found = [len(fresh.get_exact(prompt).keys) for prompt in prompts]
    assert sum(found) > 0
    assert fresh.tier.take_stats()["load", "damaged"] == 0


def test_a_full_file_system_refuses_stores_and_serves_reads(small_disk, start_side):
    disk = small_disk(40 * FILE)
    side = start_side(disk / "tier")
    side.put(keys(10))
    (disk / "other").touch()
    with suppressed_enospc(), (disk / "other").open("wb") as other:
        while True:
            other.write(bytes(4096))
            other.flush()
    side.put(keys(10, "more"))
    # Whatever was stored is whole; nothing that was there is served wrongly.
    side.get_exact(keys(10))
    assert side.tier.usable
    assert side.tier.take_stats()["store", "stored"] >= 10
    (disk / "other").unlink()
    wait_until(lambda: side.finished[side.put(keys(5, "later"))].complete)
    assert len(side.get_exact(keys(5, "later")).keys) == 5


@contextmanager
def suppressed_enospc():
    try:
        yield
    except OSError as error:
        assert error.errno == 28, error


def test_files_that_may_not_grow_are_refused_and_leave_nothing(place, start_side):
    side = start_side(place)
    side.put(keys(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT // 2, hard))
    try:
        job = side.put(keys(5, "too large"))
        assert not side.finished[job].complete
        assert side.tier.take_stats()["store", "refused"] == 5
        assert "File too large" in side.tier.health()["reason"]
        assert len(files(place)) == 2
        assert len(side.get_exact(keys(2)).keys) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_system_that_becomes_read_only_is_read(small_disk, start_side):
    disk = small_disk(40 * FILE)
    side = start_side(disk / "tier")
    side.put(keys(5))

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    side.close()
    remount("ro")
    again = start_side(disk / "tier")
    assert not again.tier.usable
    assert "Read-only" in again.tier.health()["reason"]
    remount("rw")
    wait_until(lambda: again.tier.usable)
    assert len(again.get_exact(keys(5)).keys) == 5


@pytest.mark.parametrize("when", ["at the start", "while it runs", "before a checkpoint"])
@pytest.mark.parametrize("how", ["overwritten", "cut off"])
def test_a_damaged_index_is_begun_anew(place, start_side, monkeypatch, how, when):
    if when == "before a checkpoint":
        # All that is known of the index is in the file of its log.
        monkeypatch.setattr(Index, "checkpoint", lambda _: None)
    side = start_side(place)
    side.put(keys(20))
    if when == "at the start":
        side.close()
    for path in (index(place), index(place).with_name(index(place).name + "-wal")):
        if path.exists():
            if how == "overwritten":
                path.write_bytes(b"no database " * 4000)
            else:
                os.truncate(path, 1000)
    if when == "at the start":
        side = start_side(place)
    wait_until(lambda: side.get_exact(keys(20)).keys == {} and side.tier.usable, 10)
    # What nobody knows of any more is deleted, and stored again.
    wait_until(lambda: side.tier.usable and bool(side.put(keys(20))) and stored(side, 20), 10)
    other = start_side(place)
    assert len(other.get_exact(keys(20)).keys) == 20


def stored(side: DiskSide, count: int) -> bool:
    return len(side.get_exact(keys(20)).keys) == count


def test_a_directory_that_is_deleted_is_made_anew(place, start_side):
    side = start_side(place)
    side.put(keys(5))
    # The tier makes it anew meanwhile, which is not empty then where it was.
    wait_until(lambda: subprocess.run(["rm", "-r", str(place)], check=False).returncode == 0)
    wait_until(lambda: side.get_exact(keys(5)).keys == {} and side.tier.usable)
    wait_until(lambda: bool(side.put(keys(5))) and len(side.get_exact(keys(5)).keys) == 5, 10)


def test_a_process_that_holds_the_index_costs_stores_and_no_reads(place, start_side):
    side = start_side(place)
    side.put(keys(5))
    database = sqlite3.connect(index(place), isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    try:
        job = side.put(keys(5, "more"))
        assert not side.finished[job].complete
        assert "holds the index" in side.tier.health()["reason"]
        assert side.tier.usable and len(side.get_exact(keys(5)).keys) == 5
        assert len(files(place)) == 5
    finally:
        database.execute("ROLLBACK")
        database.close()
    wait_until(lambda: side.finished[side.put(keys(5, "more"))].complete)


def test_a_slow_disk_costs_no_more_than_the_deadline(place, start_side, monkeypatch):
    side = start_side(place)
    side.put(keys(20))
    read = Directory.read

    def slowly(self, file, slot):
        time.sleep(0.2)
        return read(self, file, slot)

    monkeypatch.setattr(Directory, "read", slowly)
    loaded = side.get(keys(20))
    assert loaded.seconds < side.limits.load_deadline_s + 0.5
    assert 0 < len(loaded.keys) < 20
    assert all(loaded.slots[key] == content(key) for key in loaded.keys)
