"""A Prometheus of our own, where one is installed: it scrapes a server, and is gone afterwards."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from demo.server import free_port

BINARY = shutil.which("prometheus")
"""The program; None where there is none."""

START_TIMEOUT_S = 60.0


class Prometheus:
    """A Prometheus that scrapes servers every second. As a context manager it runs on entry, and
    has stopped after exit, with all that it has stored.

    Args:
        targets: the servers, each as ``host:port``.
        rules: files with rules, evaluated every second.
        alertmanager: where alerts go, as ``host:port``; None for nowhere.
        job: what the servers are called.
    """

    def __init__(
        self,
        targets: Sequence[str],
        rules: Sequence[Path] = (),
        alertmanager: str | None = None,
        job: str = "vllm",
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.address}"
        managers = [] if alertmanager is None else [alertmanager]
        self._config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": managers}]}]},
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(targets)}]},
            ],
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        assert BINARY is not None, "there is no prometheus"
        self._scratch = tempfile.TemporaryDirectory(prefix="prometheus-")
        directory = Path(self._scratch.name)
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(self._config))
        with open(directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    BINARY,
                    f"--config.file={directory / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C is for us; we tell it.
                start_new_session=True,
            )
        try:
            self._wait_until_ready(directory / "log")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of ``expression`` as it is now."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def query_range(self, expression: str, seconds: float) -> list[dict[str, Any]]:
        """Return the series of ``expression`` over the last ``seconds``, second by second."""
        now = time.time()
        times = {"start": now - seconds, "end": now, "step": 1}
        found: list[dict[str, Any]] = self._get("query_range", query=expression, **times)["result"]
        return found

    def label_values(self, label: str, selector: str) -> list[str]:
        """Return the values of ``label`` in the series of ``selector``."""
        found: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return found

    def _get(self, path: str, **params: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        if answer.status_code != 200:
            raise ValueError(f"{params}: {answer.text}")
        return answer.json()["data"]

    def _wait_until_ready(self, log: Path) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"prometheus did not start:\n{log.read_text(errors='replace')[-2000:]}")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()
