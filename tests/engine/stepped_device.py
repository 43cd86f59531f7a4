"""An engine whose device holds a part of what agents ask for, stepped by hand: calls meet in the
same steps whatever is behind the device, and however busy the machine is.

``python -m tests.engine.stepped_device plain|plugin SEED`` prints a JSON list, a call after the
other as they end: its name, the step in which it ended, and how many tokens it read.
"""

import json
import os
import random
import sys
from typing import Any

from benchmarks.fleet.load import Prompt, made_up, prompts
from benchmarks.harness import BLOCK
from demo.model import MODELS, TINY, build
from tests.engine import in_process
from vllm_cachescope.config import CONNECTOR, SECRET_VARIABLE

DEVICE_BLOCKS = 200
LONGEST = 10_240
PAUSE, FIRST = 20, 60
"""Steps between the calls of a session, on average, and in how many steps sessions begin."""


def engine(plugin: bool) -> Any:
    """Return an engine in this process, plain or with the plugin and two blocks of memory."""
    os.environ[SECRET_VARIABLE] = "the secret of the tests"
    further: dict[str, Any] = {}
    if plugin:
        block_bytes = BLOCK * 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4
        further["kv_transfer_config"] = {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes": 2 * block_bytes},
        }
    else:
        os.environ["VLLM_PLUGINS"] = "none"
    return in_process.start(
        build(MODELS / TINY.name, TINY),
        max_model_len=LONGEST,
        max_num_seqs=16,
        num_gpu_blocks_override=DEVICE_BLOCKS + 1,
        **further,
    )


def sessions() -> list[list[Prompt]]:
    """Return every second of the fleet's sessions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(build(MODELS / TINY.name, TINY)))
    return prompts(made_up(0, 6), "stepped", 1.0, LONGEST, tokenizer)[::2]


def driven(llm: Any, asked: list[list[Prompt]], seed: int) -> list[tuple[str, int, int]]:
    """Have sessions make their calls, each some steps after the answer to the one before."""
    from vllm import SamplingParams

    chance = random.Random(seed)
    pauses = [[int(chance.expovariate(1 / PAUSE)) for _ in session] for session in asked]
    due = [(chance.randint(0, FIRST), number, 0) for number in range(len(asked))]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    running: dict[str, tuple[int, int]] = {}
    ended, step = [], 0
    while due or running:
        for at, number, turn in sorted(due):
            if at <= step:
                due.remove((at, number, turn))
                name = f"{number}.{turn}"
                tokens = list(asked[number][turn].tokens)
                llm.add_request(name, {"prompt_token_ids": tokens}, sampling)
                running[name] = number, turn
        for output in llm.step():
            if output.finished:
                number, turn = running.pop(output.request_id)
                ended.append((output.request_id, step, output.num_cached_tokens or 0))
                if turn + 1 < len(asked[number]):
                    due.append((step + 1 + pauses[number][turn], number, turn + 1))
        step += 1
    return ended


if __name__ == "__main__":
    llm = engine(sys.argv[1] == "plugin")
    print(json.dumps(driven(llm, sessions(), int(sys.argv[2]))), flush=True)
    llm.engine_core.shutdown()
