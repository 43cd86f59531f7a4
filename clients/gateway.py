"""LiteLLM's proxy as a gateway in front of the server, used by one of the libraries."""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from clients.desk import ClientFailed, Desk
from clients.installation import OWN
from clients.libraries import library
from demo.server import free_port

_START_S = 90
_MASTER_KEY = "sk-of-the-gateway"


def litellm(route: str, program: str) -> Callable[[Desk], None]:
    """Return what runs ``program`` through a proxy with the route ``route``."""

    def run(desk: Desk) -> None:
        base = desk.url if route == "anthropic" else f"{desk.url}/v1"
        target = {"model": f"{route}/toy", "api_base": base, "api_key": desk.key}
        config = {
            "model_list": [{"model_name": "toy", "litellm_params": target}],
            "general_settings": {"forward_client_headers_to_llm_api": True},
        }
        file = desk.home / "litellm.yaml"
        file.write_text(json.dumps(config))
        url = f"http://127.0.0.1:{(port := free_port())}"
        with open(log := desk.home / "litellm.log", "wb") as output:
            process = subprocess.Popen(
                [
                    *(desk.program("litellm"), "--config", str(file)),
                    *("--host", "127.0.0.1", "--port", str(port)),
                ],
                cwd=desk.home,
                env=desk.environment()
                | {
                    "LITELLM_MASTER_KEY": _MASTER_KEY,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_TELEMETRY": "False",
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_until_ready(url, process, log)
            # The libraries come from the environment of the tests.
            library(program)(Desk(url, _MASTER_KEY, OWN, desk.directory / "caller"))
        finally:
            process.terminate()
            process.wait()

    return run


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        time.sleep(0.25)
    raise ClientFailed(f"the gateway did not start:\n{log.read_text(errors='replace')[-2000:]}")
