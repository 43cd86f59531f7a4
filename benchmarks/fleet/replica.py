"""A replica: an engine of some kind, as a fleet has several."""

import json
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.fleet.engine import Engine, FrontEnd, Tiers
from benchmarks.fleet.installed import DYNAMO, GRPC, RUST
from benchmarks.fleet.size import Size
from benchmarks.harness import BLOCK
from demo.client import MODEL
from demo.server import Server, free_port
from tests.redis.servers import RedisServer
from vllm_cachescope.config import CONNECTOR, SECRET_VARIABLE

ROOT = Path(__file__).parents[2]

SECRET = "the secret of the benchmarks"

_COMMON = {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_SERVER_DEV_MODE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    # What vLLM finds out about a model class, for which it starts a Python of its own.
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
    SECRET_VARIABLE: SECRET,
}


class GrpcReplica(Server):
    """A replica that answers no HTTP: it is ready when it says so."""

    def _is_ready(self) -> bool:
        # While another replica was waited for, this one may have said much else.
        return "Server is ready to accept requests" in self.log_tail(10_000)


class DynamoReplica(Server):
    """A worker of Dynamo's: it takes requests from Dynamo's front end alone."""

    def _address(self, host: str, port: int) -> list[str]:
        # Where it tells of its health; Dynamo takes no port beyond 32,767.
        self._system_port = _low_port(host)
        self.url = f"http://{host}:{self._system_port}"
        return []

    def _launch(self, environment: dict[str, str], log: Path) -> Any:
        return super()._launch(environment | {"DYN_SYSTEM_PORT": str(self._system_port)}, log)


@contextmanager
def replicas(
    engine: Engine, count: int, size: Size, redis: RedisServer, shared: dict[str, str]
) -> Iterator[list[Server]]:
    """Start replicas of one kind, all at once.

    Args:
        engine: their kind.
        count: how many.
        size: of each.
        redis: what their Redis tier is, where they have one.
        shared: variables that Dynamo's parts share.
    """
    made = [_replica(engine, size, redis, shared) for _ in range(count)]
    with ExitStack() as stack:
        for one in made:
            one.begin()
            stack.push(one)
        for one in made:
            one.wait_until_ready()
        yield made


def _replica(engine: Engine, size: Size, redis: RedisServer, shared: dict[str, str]) -> Server:
    options = [
        *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(size.longest), "--max-num-seqs", "16"),
        *("--num-gpu-blocks-override", str(size.device_blocks + 1)),
        *("--distributed-executor-backend", "uni"),
    ]
    if engine.plugin:
        transfer = {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": _config(engine.tiers, size, redis),
        }
        options += ["--kv-transfer-config", json.dumps(transfer)]
    environment = dict(_COMMON)
    if not engine.plugin:
        environment["VLLM_PLUGINS"] = "none"
    model = str(size.model)
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    details = "--enable-prompt-tokens-details"
    match engine.front_end:
        case FrontEnd.PYTHON:
            module = "vllm.entrypoints.openai.api_server"
            command = [sys.executable, "-m", module, "--model", model, *options, *tools, details]
            return Server(command, environment)
        case FrontEnd.RUST:
            own = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(RUST.path)}
            command = [sys.executable, "-m", "tests.engine.vllm_cli", "--model", model]
            return Server([*command, *options, *tools, details], environment | own)
        case FrontEnd.GRPC:
            command = [str(GRPC.path), "-m", "tests.engine.vllm_cli", "--model", model]
            command += [*options, "--grpc", *_events(free_port())]
            return GrpcReplica(command, environment)
        case FrontEnd.DYNAMO:
            command = [str(DYNAMO.path), "-m", "dynamo.vllm", "--model", model, *options]
            # Its vLLM is another one.
            own = {"VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm-dynamo")}
            return DynamoReplica([*command, *_events(free_port())], environment | own | shared)


def _config(tiers: Tiers, size: Size, redis: RedisServer) -> dict[str, Any]:
    # The least there is: what one request has on its way.
    config: dict[str, Any] = {"cpu_bytes": 2 * size.block_bytes}
    # What clients mark so, too; SMG takes their marks out of messages.
    config["regions"] = {region: {"scope": "global"} for region in ("tools", "system")}
    if tiers is not Tiers.DEVICE:
        config["cpu_bytes"] = size.cpu_blocks * size.block_bytes
    if tiers is Tiers.REDIS:
        # Two replicas, a Redis, a router and the agents share few cores here: each waits for all.
        config["tiers"] = [{"type": "redis", "url": redis.url, "load_deadline": "5s"}]
    return config


def _low_port(host: str) -> int:
    while True:
        port = random.randrange(20_000, 32_000)
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind((host, port))
            return port


def _events(port: int) -> list[str]:
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    return ["--kv-events-config", json.dumps(events), "--block-size", str(BLOCK)]
