"""Real API servers, with and without the plugin, and how to talk to them."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from demo.server import Server
from tests.config_files import in_file
from tests.engine import forks
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import SECRET

ROOT = Path(__file__).parents[2]
MODEL = "toy"
OPERATOR_TOKEN = "the operator of the tests"
NAMED_KEY = "key of the named"
OTHER_NAMED_KEY = "key of the other named"
REPAIRED_KEY = "key of the repaired"
"""Of the one organisation whose requests are repaired."""
ONE_PROCESS = ("--distributed-executor-backend", "uni")
"""For scheduler and worker: a server is up sooner than with one for each."""

REPAIR = {
    "tools_order": True,
    "json_form": True,
    "latched_field": True,
    "latched_params": ["chat_template_kwargs.today"],
    "volatile_head": [
        {"pattern": r"Nonce: [0-9a-f]+\n"},
        {"pattern": r"Now: [^\n]*\n", "action": "move"},
    ],
}
"""What is put right for the organisation of `REPAIRED_KEY`."""

SMALL = ("--max-model-len", "4096", "--num-gpu-blocks-override", "40", *ONE_PROCESS)
"""Options of a server with little room."""

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # A helper for the log probabilities of prompts is all that would be compiled, in 10 seconds.
    "TORCH_COMPILE_DISABLE": "1",
    # What vLLM finds out about a model class, for which it starts a Python of its own.
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
}
"""Of every server."""


def plugin(**config: Any) -> list[str]:
    """Return the arguments for the plugin, with further keys of its configuration."""
    own = {
        "cpu_bytes": "128MiB",
        "secret": SECRET,
        "sweep_interval": "1s",
        "operator_token": OPERATOR_TOKEN,
        "tenants": {
            sha256(key.encode()).hexdigest(): name
            for key, name in (
                (NAMED_KEY, "named"),
                (OTHER_NAMED_KEY, "other"),
                (REPAIRED_KEY, "repaired"),
            )
        },
        # By its id: a test may name other tenants.
        "repair": {"orgs": {"name:repaired": REPAIR}},
    }
    transfer = {
        "kv_connector": "DrivenConnector",
        "kv_connector_module_path": "tests.engine.clock",
        "kv_role": "kv_both",
        "kv_connector_extra_config": in_file(own | config),
    }
    return ["--kv-transfer-config", json.dumps(transfer)]


class ForkedServer(Server):
    """A server in a process that has vLLM imported when it starts."""

    def _launch(self, environment: dict[str, str], log: Path) -> Any:
        interpreter, option, *command = self._command
        assert (interpreter, option) == (sys.executable, "-m")
        return forks.Command(command, environment, log)


@contextmanager
def serve(
    model: Path,
    arguments: list[str],
    environment: dict[str, str],
    as_user: bool = False,
    module: str = "vllm.entrypoints.openai.api_server",
) -> Iterator[str]:
    """Serve ``model`` as `server` does; yield the server's URL."""
    with server(model, arguments, environment, as_user, module) as started:
        yield started.url


def server(
    model: Path,
    arguments: list[str],
    environment: dict[str, str],
    as_user: bool = False,
    module: str = "vllm.entrypoints.openai.api_server",
) -> Server:
    """Return a server of ``model`` under the name `MODEL`; enter it to start it.

    Args:
        model: the model's directory.
        arguments: further arguments of the server.
        environment: further variables of its environment.
        as_user: whether to start vLLM as a user does, instead of with a fork.
        module: the module that is the server.
    """
    command = [
        *(sys.executable, "-m", module),
        *("--model", str(model), "--served-model-name", MODEL),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"),
        *("--num-gpu-blocks-override", "400", "--max-num-seqs", "8"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *arguments,
    ]
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        # On a CPU vLLM makes a worker process all the same, unless it is told twice.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if set(ONE_PROCESS) <= set(arguments) else "1",
    }
    server_class = Server if as_user else ForkedServer
    return server_class(command, ENVIRONMENT | own | environment)


@dataclass(frozen=True, slots=True)
class Api:
    """A server with the plugin, and its clock.

    Attributes:
        url: where it is.
        clock: the time its caches live on.
    """

    url: str
    clock: Clock

    def anthropic(self, key: str = "key of acme") -> anthropic.Anthropic:
        """Return a client of the organisation known by ``key``."""
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0)

    def openai(self, key: str = "key of acme") -> openai.OpenAI:
        """Return a client of the organisation known by ``key``."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: Any, key: str | None = "key of acme", **headers: str):
        """Post ``body`` as JSON, without a client's own ideas of what may be sent."""
        if key is not None:
            headers["x-api-key"] = key
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def empty_device(self) -> None:
        """Empty vLLM's prefix cache, and no tier behind it."""
        httpx.post(f"{self.url}/reset_prefix_cache", timeout=60).raise_for_status()

    def metrics(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """Return the samples called ``name``, summed by the values of ``labels``."""
        samples: Counter[tuple[str, ...]] = Counter()
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    samples[tuple(sample.labels[label] for label in labels)] += int(sample.value)
        return samples

    def await_metrics(
        self, name: str, labels: tuple[str, ...], expected: Counter[tuple[str, ...]]
    ) -> Counter[tuple[str, ...]]:
        """Return `metrics` once they are as ``expected``, or as they are after some seconds: the
        engine tells the API process of them a step later."""
        deadline = time.monotonic() + 15
        while (found := +self.metrics(name, *labels)) != expected and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


@contextmanager
def serve_scoped(
    model: Path,
    scratch: Path,
    *options: str,
    as_user: bool = False,
    module: str = "vllm.entrypoints.openai.api_server",
    **config: Any,
) -> Iterator[Api]:
    """Serve ``model`` with the plugin, on a clock of its own.

    Args:
        model: the model's directory.
        scratch: where the clock's file goes.
        options: further options of the server.
        as_user: whether to start vLLM as a user does, instead of with a fork.
        module: the module that is the server.
        config: further keys of the plugin's configuration.
    """
    path = scratch / "server clock"
    clock = Clock(path)
    arguments = [*plugin(**config), *options]
    with serve(model, arguments, {VARIABLE: str(path)}, as_user, module) as url:
        yield Api(url, clock)


def breaks(api: Api, key: str) -> list[dict]:
    response = httpx.get(f"{api.url}/cachescope/breaks", headers={"x-api-key": key}, timeout=60)
    return response.raise_for_status().json()["breaks"]


def named(api: Api, key: str, ask: Callable[[], object]) -> dict:
    """Return the one break that ``ask`` makes, and see that the metrics name the same cause."""
    before = api.metrics("cachescope_breaks_total", "cause")
    known = len(breaks(api, key))
    ask()
    after = api.metrics("cachescope_breaks_total", "cause")
    seen, *_ = found = breaks(api, key)
    assert len(found) == known + 1, found[:1]
    assert after - before == {(seen["cause"],): 1}
    assert sum(seen["uncached"].values()) <= seen["prompt_tokens"]
    assert sum(api.metrics("cachescope_unexplained_tokens_total").values()) == 0
    return seen
