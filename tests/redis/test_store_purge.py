"""``cachescope purge`` without a server: by the Redis that the engines share, and nothing else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.redis.engine_side import SECRET, EngineSide, keys
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.cli import main as command
from vllm_cachescope.cli import store_purge
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.fleet_purges import CONFIRM_S
from vllm_cachescope.tiers.purge_notices import PurgeNotice

OWN = OwnerTags(SECRET)
ACME, OTHER = (OWN.of(Caller(org)) for org in ("name:acme", "name:other"))


@pytest.fixture(autouse=True)
def secret(monkeypatch) -> None:
    monkeypatch.setenv("CACHESCOPE_SECRET", SECRET.decode())


@pytest.fixture
def config_file(tmp_path, server) -> str:
    """What engines with one tenant are configured with."""
    path = tmp_path / "cachescope.yaml"
    tenant = f"tenants: {{'{'0' * 64}': acme}}\n"
    path.write_text(f"{tenant}tiers: [{{type: redis, url: '{server.url}'}}]\n")
    path.chmod(0o600)
    return str(path)


@contextmanager
def heeding(*sides: EngineSide) -> Iterator[list[PurgeNotice]]:
    """Have engines carry out what they hear of, and delete it in the store as well."""
    notices: list[PurgeNotice] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.005):
            for side in sides:
                assert side.tier.fleet is not None
                for errand in side.tier.fleet.take():
                    notices.append(errand.notice)
                    side.tier.fleet.carried_out(errand, [side.tier.purge(errand.notice.prefix)])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield notices
    finally:
        over.set()
        thread.join()


def stored(side: EngineSide, server: RedisServer) -> None:
    """Have an engine store two blocks of one organisation and one of another."""
    side.put([*keys(2, "a", ACME), *keys(1, "b", OTHER)])
    assert len(entries(server)) == 3


def follows(side: EngineSide) -> None:
    fleet = side.tier.fleet
    assert fleet is not None
    wait_until(lambda: fleet.follows)


def test_engines_without_a_server_carry_it_out(server, start_engine_side, config_file, capsys):
    sides = [start_engine_side(server.url, name=name) for name in ("a", "b")]
    for side in sides:
        follows(side)
    stored(sides[0], server)
    with heeding(*sides) as notices:
        assert command.main(["purge", "--cachescope", config_file, "--org", "acme"]) == 0
    ((prefix, org, session),) = {(n.prefix, n.org, n.session) for n in notices}
    assert (prefix, org, session) == (ACME[:8], "name:acme", None)
    assert len(notices) == len(sides)
    assert len(entries(server)) == 1
    said = capsys.readouterr().out
    assert "entries forgotten: redis 2" in said and "done as well: a, b" in said


def test_nobody_runs_and_the_store_is_emptied_all_the_same(server, start_engine_side, capsys):
    side = start_engine_side(server.url, name="a")
    follows(side)
    stored(side, server)
    side.close()
    # As if the engine had gone an hour ago.
    server.client.delete(*server.client.keys("*purges*followers"))
    assert command.main(["purge", "--redis", server.url, "--all"]) == 0
    assert not entries(server)
    assert "no engine is running" in capsys.readouterr().out


def test_one_session_of_requests_without_a_key(server, start_engine_side):
    side = start_engine_side(server.url, name="a")
    follows(side)
    owners = [OWN.of(Caller("anonymous", session)) for session in ("s1", "s2")]
    side.put([key for owner in owners for key in keys(1, "c", owner)])
    with heeding(side) as notices:
        assert command.main(["purge", "--redis", server.url, "--session", "s1"]) == 0
    assert [(n.prefix, n.org, n.session) for n in notices] == [(owners[0], "anonymous", "s1")]
    assert len(entries(server)) == 1


def test_who_does_not_answer_is_named(server, start_engine_side, config_file, capsys):
    side = start_engine_side(server.url, name="a")
    follows(side)
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += CONFIRM_S

    config = store_purge.settings_of(None, {"config_file": config_file})
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    # Its clock is no clock of the store's deadlines: those are far away.
    assert not store_purge.purge(config, "acme", None, lambda: clock() + 1e9, pause)
    assert "not known to be done: a (it has not said within" in capsys.readouterr().err


def test_another_secret_purges_nothing(server, start_engine_side, monkeypatch, capsys):
    side = start_engine_side(server.url, name="a")
    follows(side)
    stored(side, server)
    monkeypatch.setenv("CACHESCOPE_SECRET", "a secret of somebody else")
    with heeding(side) as notices:
        assert command.main(["purge", "--redis", server.url, "--all"]) == 1
    assert notices == [] and len(entries(server)) == 3
    assert "another secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--redis", "redis://:password@localhost"], "a secret may not stand"),
        (["--set", "cpu_bytes=1GiB"], "none keeps a purge log"),
        (["--redis", "redis://localhost", "--url", "http://localhost"], "go without one"),
        (["--redis", "redis://localhost", "--org", "nobody"], "is no organisation"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said, capsys):
    what = [] if "--org" in arguments else ["--all"]
    with pytest.raises(SystemExit) as ended:
        command.main(["purge", *what, *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_store_that_is_down_is_said(server, capsys):
    server.kill()
    assert command.main(["purge", "--redis", server.url, "--all"]) == 1
    assert "could not be reached" in capsys.readouterr().err
