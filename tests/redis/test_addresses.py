"""How a tier comes to its server: over TLS, and through Sentinels to whoever is the primary."""

import subprocess
from pathlib import Path

import pytest
import redis
import trustme

from tests.redis.engine_side import keys
from tests.redis.servers import REDIS_SERVER, free_port, wait_until


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


def issued(ca: trustme.CA, name: str, directory: Path) -> tuple[Path, Path]:
    """Issue a certificate to ``name``; return its file and its key's."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    made = ca.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(cert)
    made.private_key_pem.write_to_path(key)
    return cert, key


@pytest.fixture
def tls_server(ca, start_server, tmp_path) -> tuple[int, Path]:
    """A server that takes TLS, from clients with a certificate of its authority; return its port
    and the file of the authority's own certificate."""
    trusted = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(trusted)
    cert, key = issued(ca, "localhost", tmp_path)
    port = free_port()
    start_server(
        *("--tls-port", str(port), "--tls-ca-cert-file", str(trusted)),
        *("--tls-cert-file", str(cert), "--tls-key-file", str(key)),
    )
    return port, trusted


def client_files(ca: trustme.CA, directory: Path) -> str:
    """Issue a client's certificate; return the part of a URL that names it."""
    cert, key = issued(ca, "client@example.com", directory)
    return f"ssl_certfile={cert}&ssl_keyfile={key}"


def test_over_tls(ca, tls_server, start_engine_side, tmp_path):
    port, trusted = tls_server
    options = f"ssl_ca_certs={trusted}&{client_files(ca, tmp_path)}"
    side = start_engine_side(f"rediss://localhost:{port}?{options}")
    # More than one TLS record, several at once.
    side.put(keys(30))
    assert set(side.get_exact(keys(30)).keys) == set(keys(30))
    assert side.tier.health()["address"] == f"rediss://localhost:{port}"


def test_a_server_or_a_client_that_nobody_vouches_for(ca, tls_server, start_engine_side, tmp_path):
    port, trusted = tls_server
    nobody = trustme.CA()
    stranger = tmp_path / "stranger.pem"
    nobody.cert_pem.write_to_path(stranger)
    for options, reason in (
        (f"ssl_ca_certs={stranger}&{client_files(ca, tmp_path)}", "CERTIFICATE_VERIFY_FAILED"),
        # The server hangs up; how that shows depends on who is first to notice.
        (f"ssl_ca_certs={trusted}", ""),
    ):
        side = start_engine_side(f"rediss://localhost:{port}?{options}")
        assert not side.get(keys(1)).keys
        wait_until(lambda side=side: side.tier.health()["reason"] is not None)
        assert not side.tier.usable
        assert reason in side.tier.health()["reason"]


@pytest.fixture
def service(start_server, tmp_path):
    """A primary, a replica of it, and a Sentinel that watches over both."""
    primary = start_server()
    replica = start_server("--replicaof", f"127.0.0.1 {primary.port}")
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"sentinel monitor cache 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds cache 300\n"
        "sentinel failover-timeout cache 2000\n"
    )
    port = free_port()
    process = subprocess.Popen(
        [str(REDIS_SERVER), str(settings), "--sentinel", "--port", str(port)],
        stdout=subprocess.DEVNULL,
    )
    sentinel = redis.Redis(port=port)

    def watches() -> bool:
        try:
            return sentinel.sentinel_master("cache")["num-slaves"] == 1
        except redis.ConnectionError:
            return False

    try:
        # It asks the primary for its replicas every ten seconds.
        wait_until(watches, 30)
        yield primary, replica, f"redis+sentinel://127.0.0.1:{port}/cache"
    finally:
        process.kill()
        process.wait()


def test_a_replica_takes_over(service, start_engine_side):
    primary, replica, url = service
    side = start_engine_side(url)
    side.put(keys(10))
    wait_until(lambda: replica.client.dbsize() == primary.client.dbsize())
    assert set(side.get_exact(keys(10)).keys) == set(keys(10))
    primary.kill()
    # Until the replica is promoted, all are misses; then what it holds is found, and it is
    # written to.
    wait_until(lambda: replica.client.info("replication")["role"] == "master", 30)
    wait_until(lambda: set(side.get_exact(keys(10)).keys) == set(keys(10)), 30)
    side.put(keys(10, "new"))
    assert set(side.get_exact(keys(10, "new")).keys) == set(keys(10, "new"))
    assert replica.client.exists(side.name(keys(10, "new")[0]))


def test_a_primary_that_is_demoted_is_left(service, start_engine_side):
    """A failover without a fault: the old primary still answers, but takes no writes."""
    primary, replica, url = service
    side = start_engine_side(url)
    side.put(keys(5))
    sentinel = redis.Redis(port=int(url.rpartition("/")[0].rpartition(":")[2]))

    def hands_over() -> bool:
        try:
            return sentinel.execute_command("SENTINEL", "FAILOVER", "cache")
        except redis.ResponseError:
            # A replica that it has only just met it does not trust yet.
            return False

    wait_until(hands_over, 30)
    wait_until(lambda: primary.client.info("replication")["role"] == "slave", 30)

    def is_stored_there() -> bool:
        side.put(keys(3, "after"))
        return bool(replica.client.exists(side.name(keys(3, "after")[0])))

    wait_until(is_stored_there, 30)
    wait_until(lambda: len(side.get_exact(keys(3, "after")).keys) == 3)
