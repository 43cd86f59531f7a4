"""``make clients``: takes real clients through a tool call and a resumed session, on a real server.

Each client is installed as its users install it, and run in a scratch home against vLLM with the
plugin. What passes is recorded, and what the clients mark, how their sessions are known and what
they read from the cache is printed as a table.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from clients.catalogue import CLIENTS, Client
from clients.desk import ClientFailed, Desk
from clients.findings import Findings, find, read_breaks, read_unexplained
from clients.installation import ROOT, NotInstalled
from clients.recorder import Recorder
from demo.client import read_metrics
from demo.model import MODELS, TINY, build
from demo.server import Server
from vllm_cachescope.cli.serve import serve_command

_SIZE = replace(TINY, name="clients", vocab=8192, max_positions=131_072)
"""The prompts of coding agents are long, and no model's answers matter here."""


def main() -> int:
    """Run the clients that the arguments choose; return 1 if anything is not as it should be."""
    # So that the server is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="make clients", description=__doc__.split("\n")[0])
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep requests and replies")
    arguments = parser.parse_args()
    clients = [client for client in CLIENTS if client.name in arguments.only]

    console = Console(width=None if sys.stdout.isatty() else 180)
    installed: list[tuple[Client, Path]] = []
    for client in clients:
        try:
            installed.append((client, client.packages.install(client.folder)))
        except NotInstalled as error:
            console.print(f"{client.name} is left out: {error}", markup=False)
    table = _table()
    faults: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="cachescope-clients-") as scratch,
        Server(_command(), {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}) as server,
    ):
        for client, prefix in installed:
            console.print(client.name, markup=False)
            try:
                findings = _run(client, prefix, server.url, Path(scratch), arguments.keep)
            except ClientFailed as error:
                faults.append(f"{client.name}: {error}")
                continue
            faults += [f"{client.name}: {fault}" for fault in findings.faults]
            table.add_row(*_row(client, findings))
    console.print(table)
    for fault in faults:
        console.print(fault, markup=False)
    return int(bool(faults))


def _command() -> list[str]:
    return serve_command(
        str(build(MODELS / _SIZE.name, _SIZE)),
        {"cpu_bytes": "256MiB"},
        [
            *("--served-model-name", "toy", "claude-toy", "--dtype", "float32", "--enforce-eager"),
            *("--chat-template-content-format", "openai"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--logits-processors", "clients.obedience:Obedience"),
        ],
    )


def _run(client: Client, prefix: Path, url: str, scratch: Path, keep: Path | None) -> Findings:
    metrics, unexplained = read_metrics(url), read_unexplained(url)
    key = f"key-of-{client.name}"
    recorder = Recorder(url)
    try:
        with recorder:
            client.run(Desk(recorder.url, key, prefix, scratch / client.name))
    finally:
        if keep is not None:
            recorder.write(keep / f"{client.name}.jsonl")
    return find(
        recorder.exchanges,
        read_metrics(url).since(metrics),
        read_unexplained(url) - unexplained,
        read_breaks(url, key),
    )


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("client", "version", "endpoint"):
        table.add_column(name)
    for name in ("requests", "prompt tokens", "read", "resumed"):
        table.add_column(name, justify="right")
    for name in ("markers, and in how many requests", "session"):
        table.add_column(name, overflow="fold")
    return table


def _row(client: Client, findings: Findings) -> tuple[str, ...]:
    marks = "\n".join(f"{place} {times}" for place, times in findings.marks.items())
    return (
        client.name,
        client.packages.versions,
        ", ".join(findings.paths),
        str(findings.requests),
        f"{findings.prompt_tokens:,}",
        _share(findings.read, findings.prompt_tokens),
        _share(findings.resumed["read"], findings.resumed["prompt"]),
        marks or "none",
        findings.session,
    )


def _share(read: int, prompt: int) -> str:
    return f"{read / prompt:.1%}" if prompt else "none"


if __name__ == "__main__":
    sys.exit(main())
