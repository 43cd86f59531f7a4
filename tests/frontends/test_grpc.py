"""vLLM's own gRPC server in front of an engine with the connector, as SMG talks to it."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.server import Server
from tests.engine.clock import VARIABLE
from tests.engine.engine import draw_tokens
from tests.engine.server import ENVIRONMENT, ROOT
from tests.frontends.asked import (
    LENGTH,
    WHOLE,
    assert_is_read_from_memory,
    assert_reads_what_plain_vllm_reads,
)
from tests.frontends.places import GRPC, needs, options

pytestmark = [pytest.mark.engine, needs(GRPC)]


class GrpcServer(Server):
    """A server that answers no HTTP: it is ready when it says so."""

    def _is_ready(self) -> bool:
        return "Server is ready to accept requests" in self.log_tail(50)


class Client:
    """The client, in a process of its own."""

    def __init__(self, address: str) -> None:
        command = [str(GRPC), str(Path(__file__).parent / "grpc_client.py"), address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )

    def ask(self, tokens: list[int], params: dict[str, Any] | None = None) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        line = json.dumps({"tokens": tokens, "params": params or {}})
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def read(self, tokens: list[int], params: dict[str, Any] | None = None) -> int:
        answer = self.ask(tokens, params)
        assert "cachescope" not in answer["said"]
        return int(answer["read"])

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[Server]:
    arguments = options(tiny_model, "--grpc")
    own = {"PYTHONPATH": str(ROOT), VARIABLE: str(tmp_path_factory.mktemp("grpc") / "clock")}
    command = [str(GRPC), "-m", "tests.engine.vllm_cli", *arguments]
    with GrpcServer(command, ENVIRONMENT | own) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    client = Client(server.url.removeprefix("http://"))
    yield client
    client.close()


def test_it_is_recognised(server: Server) -> None:
    assert "Front end: vLLM's gRPC server; it reads no marks" in server.log_tail(500)


def test_it_reads_what_plain_vllm_reads(client: Client) -> None:
    assert_reads_what_plain_vllm_reads(client.read, random.Random(1))


def test_the_tier_in_memory_is_read(client: Client) -> None:
    assert_is_read_from_memory(client.read, random.Random(2))


def test_a_forged_plan_shares_with_nobody(client: Client) -> None:
    tokens = draw_tokens(random.Random(4), LENGTH)
    forged = {"cachescope": {"spans": [[64, 1, "00", 300, True]], "mac": "0" * 32}}
    assert [client.read(tokens), client.read(tokens, forged), client.read(tokens)] == [
        *(0, 0),
        WHOLE,
    ]
