"""The demo's server held open, with traffic, for whoever looks at its page."""

import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console

from demo.client import AnthropicClient, OpenAIClient
from demo.traffic import Step, steps

PAUSE_S = 1.5
"""Between two requests, in seconds."""

KEYS = {"north": "key-of-north", "south": "key-of-south"}


class Agents:
    """The agents' clients.

    Args:
        url: the server.
    """

    def __init__(self, url: str) -> None:
        self._clients = {
            (client.name, org): client(url, key)
            for client in (AnthropicClient, OpenAIClient)
            for org, key in KEYS.items()
        }

    def send(self, requests: Iterator[Step], pause_s: float) -> None:
        """Send requests, with a pause after each in seconds."""
        for step in requests:
            self._clients[step.client, step.org].ask(step.body, step.session)
            time.sleep(pause_s)


def hold(url: str, token: str, console: Console) -> None:
    """Have agents go on until the run is interrupted.

    Args:
        url: the server.
        token: its operator's token.
        console: where to say how to look at the page.
    """
    console.print(f"\n[bold]The page is open at[/bold] {url}/cachescope")
    console.print(f"  everyone's requests, with the operator token  {token}", markup=False)
    for org, key in KEYS.items():
        console.print(f"  those of {org} alone, with its API key         {key}", markup=False)
    console.print("Agents go on meanwhile. Press Ctrl-C to stop.")
    with suppress(KeyboardInterrupt):
        Agents(url).send(steps(), PAUSE_S)
