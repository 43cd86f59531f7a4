"""A real Alertmanager of our own, and what it tells an operator."""

import json
import shutil
import subprocess
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import yaml

from demo.server import free_port
from tests.redis.servers import wait_until

BINARY = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")


class Operator:
    """Whom Alertmanager calls: a web hook that notes what it hears."""

    def __init__(self) -> None:
        self.heard: dict[str, list[dict]] = defaultdict(list)
        operator = self

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                for alert in body["alerts"]:
                    operator.heard[alert["labels"]["alertname"]].append(alert)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def last(self, name: str, **labels: str) -> dict | None:
        """What was heard last of the alert ``name`` with ``labels``."""
        return next(
            (one for one in reversed(self.heard[name]) if labels.items() <= one["labels"].items()),
            None,
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Alertmanager:
    """An Alertmanager that passes on everything at once, each alert by itself.

    Args:
        directory: where it may write.
        hook: the web hook to call.
        shipped: the configuration whose inhibitions hold.
    """

    def __init__(self, directory: Path, hook: str, shipped: Mapping) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        directory.mkdir()
        config = {
            **shipped,
            "route": {
                **shipped["route"],
                "group_by": ["..."],
                "group_wait": "0s",
                "group_interval": "1s",
            },
            "receivers": [
                {
                    "name": shipped["route"]["receiver"],
                    "webhook_configs": [{"url": hook, "send_resolved": True}],
                }
            ],
        }
        (directory / "alertmanager.yaml").write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [
                str(BINARY),
                f"--config.file={directory / 'alertmanager.yaml'}",
                f"--storage.path={directory / 'data'}",
                f"--web.listen-address={self.address}",
                "--cluster.listen-address=",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(self._answers)
        except TimeoutError:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://{self.address}/-/ready", timeout=5).status_code == 200
        return False
