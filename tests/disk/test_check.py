"""What ``cachescope check`` and every start find out about a disk tier's directory."""

import time
from pathlib import Path

import pytest

from tests.redis.engine_side import SECRET
from vllm_cachescope.config import Config, ConfigError
from vllm_cachescope.connectors.disk import mounts
from vllm_cachescope.connectors.vllm import remote_stores, store_factory
from vllm_cachescope.connectors.vllm.findings import Finding, Status


def configured(place: Path, secret: bytes = SECRET, **keys: object) -> Config:
    tier = {"type": "disk", "path": str(place), "capacity": "1MiB", "keep_free": 0, **keys}
    return Config.model_validate({"secret": secret.decode(), "tiers": [tier]})


def found(place: Path, secret: bytes = SECRET, **keys: object) -> Finding:
    config = configured(place, secret, **keys)
    return remote_stores.check(config.tiers[0], config)


def refusal(place: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        store_factory.check(configured(place).tiers[0])
    return str(refused.value.args[0])


def test_a_directory_that_is_not_there_is_not_made(place) -> None:
    assert found(place).found == f"{place} answers; no engine uses it now"
    store_factory.check(configured(place).tiers[0])
    assert not place.exists()


def test_engines_with_another_secret_are_found(place, start_side) -> None:
    start_side(place, identity="a model", secret=b"another secret, as long", wall=time.time)
    alone = found(place)
    assert alone.status is Status.FAILURE and "engines with another secret" in alone.found
    assert found(place, b"another secret, as long").status is Status.OK
    start_side(place, identity="another model", wall=time.time)
    both = found(place)
    assert both.status is Status.OK and "engines with this secret use it" in both.found


def test_a_capacity_that_there_is_no_room_for(place) -> None:
    told = found(place, capacity="1000TiB")
    assert told.status is Status.WARNING
    assert "capacity is 1000.0TiB" in told.found and "has room for" in told.found


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_directory_that_is_open_to_others(place, mode) -> None:
    place.mkdir()
    place.chmod(mode)
    assert f"open to others (mode {mode:o}); allowed: 700" in refusal(place)
    assert found(place).status is Status.FAILURE


def test_what_is_no_directory_of_ours(tmp_path, place) -> None:
    place.symlink_to(tmp_path)
    assert "symbolic link" in refusal(place)
    place.unlink()
    place.write_text("")
    assert "is no directory" in refusal(place)
    assert "cannot be made" in refusal(place / "below")


def test_a_file_system_that_machines_share(place, tmp_path, monkeypatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:35 / {tmp_path} rw,relatime shared:9 - nfs4 server:/x rw\n"
        "41 22 0:36 / /tm rw,relatime - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    assert mounts.type_of(tmp_path / "a" / "b") == "nfs4"
    assert mounts.type_of(Path("/tmp-else")) == "ext4"
    assert "machines share (nfs4)" in refusal(place)
    table.unlink()
    assert mounts.type_of(place) is None
