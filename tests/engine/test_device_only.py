"""A device that holds a quarter of what is asked for, and two blocks of memory behind it: the
plugin reads what plain vLLM reads, call by call."""

import json
import random
import subprocess
import sys
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from benchmarks.fleet.load import Prompt, made_up, prompts
from benchmarks.harness import BLOCK, server
from demo.client import MODEL
from demo.model import MODELS, SMALL, build
from demo.server import Server
from tests.engine.stepped_device import DEVICE_BLOCKS, sessions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LONGEST = 10_000


def unmarked(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("cache_control", None)
    return fields


def read(running: Server, calls: list[Prompt]) -> list[int]:
    """Return how many tokens of each call are read, one after the other."""
    found = []
    with httpx.Client(base_url=running.url, timeout=600) as client:
        for call in calls:
            chat = json.loads(json.dumps(call.chat), object_hook=unmarked)
            body = {"model": MODEL, "max_tokens": 4, "temperature": 0, **chat}
            answer = client.post(
                "/v1/chat/completions",
                json=body | {"prompt_cache_key": call.session},
                headers={"authorization": f"Bearer key of {call.call.tenant}"},
            )
            answer.raise_for_status()
            details = answer.json()["usage"]["prompt_tokens_details"] or {}
            found.append(details.get("cached_tokens") or 0)
    return found


def test_the_plugin_reads_what_plain_vllm_reads() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(build(MODELS / SMALL.name, SMALL)))
    sessions = prompts(made_up(0, 5), "device", 1.0, LONGEST, tokenizer)
    chance, calls = random.Random(1), []
    while left := [session for session in sessions if session]:
        calls.append(chance.choice(left).pop(0))
    in_use = {p.tokens[:end] for p in calls for end in range(BLOCK, len(p.tokens), BLOCK)}
    longest = max(len(p.tokens) for p in calls)
    blocks = max(len(in_use) // 4, longest // BLOCK + 4)
    small = "--num-gpu-blocks-override", str(blocks + 1), "--max-model-len", str(LONGEST)
    regions = {region: {"scope": "global"} for region in ("tools", "system")}
    with server(False, *small) as running:
        plain = read(running, calls)
    with server(True, *small, cpu_bytes=2 * 2**20, regions=regions) as running:
        ours = read(running, calls)
    assert ours == plain
    assert 0 < sum(plain) < sum(len(p.tokens) for p in calls) * 0.9


def stepped(kind: str, seed: int) -> list[tuple[str, int, int]]:
    """Return what `tests.engine.stepped_device` found, in a process of its own."""
    command = [sys.executable, "-m", "tests.engine.stepped_device", kind, str(seed)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return [tuple(one) for one in json.loads(ended.stdout.splitlines()[-1])]


@pytest.mark.parametrize("seed", [0, 1])
def test_it_reads_the_same_where_calls_meet(seed: int) -> None:
    """Eight agents at once on a device that holds three of their prompts: the same calls end in the
    same steps, and each has read the same. So what two servers read differently comes from when
    calls came."""
    plain, plugin = stepped("plain", seed), stepped("plugin", seed)
    assert plugin == plain
    calls = [prompt for session in sessions() for prompt in session]
    assert len(plain) == len(calls)
    longest = max(len(prompt.tokens) for prompt in calls)
    assert 4 * longest > DEVICE_BLOCKS * BLOCK
    asked = sum(len(prompt.tokens) for prompt in calls)
    assert 0 < sum(read for _, _, read in plain) < 0.8 * asked
