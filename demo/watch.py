"""A Prometheus that watches the demo's server, where one is installed: it fills the dashboard."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from demo import board
from demo.prometheus import BINARY, Prometheus


@dataclass(slots=True)
class Watch:
    """The Prometheus, and since when it has been watching.

    Attributes:
        prometheus: it; None where none is installed.
    """

    prometheus: Prometheus | None
    _began: float = field(default_factory=time.monotonic)

    def lines(self) -> list[str]:
        """Return what there is to say of the dashboard, in lines."""
        if self.prometheus is None:
            return ["No prometheus is installed, which would fill the dashboard's panels."]
        try:
            asked = board.ask(self.prometheus, time.monotonic() - self._began)
        except (ValueError, httpx.HTTPError) as error:
            return [f"Prometheus at {self.prometheus.url} could not be asked: {error}"]
        panels = {one.panel for one in asked}
        empty = {one.panel for one in asked if not one.series}
        lines = [
            f"Prometheus at {self.prometheus.url} fills {len(panels - empty)} of {len(panels)} "
            f"panels of configs/grafana/{board.DASHBOARD.name}."
        ]
        if empty:
            lines.append(f"Nothing of this was seen in the run: {', '.join(sorted(empty))}.")
        return lines


@contextmanager
def watching(url: str) -> Iterator[Watch]:
    """Have a Prometheus scrape the server at ``url``, with the shipped rules."""
    if BINARY is None:
        yield Watch(None)
        return
    directory = board.DASHBOARD.parents[1] / "prometheus"
    rules = [directory / "rules.yaml", directory / "alerts.yaml"]
    with Prometheus([url.removeprefix("http://")], rules) as prometheus:
        yield Watch(prometheus)
