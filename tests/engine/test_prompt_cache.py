"""`PromptCache` and `AsyncPromptCache` as users run them: the engine has a process of its own, and
nobody has configured a secret."""

import ast
import asyncio
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from demo import offline
from tests.engine import forks
from tests.engine.engine import BLOCK
from tests.engine.marked_prompts import CUTS, HANDBOOK, told
from tests.engine.server import ENVIRONMENT, ROOT
from vllm_cachescope import AsyncPromptCache, Prompt
from vllm_cachescope.config import CONNECTOR

pytestmark = pytest.mark.engine

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "num_gpu_blocks_override": 100,
    # On a CPU vLLM would start a worker in one more process.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}


def show_example(model: str, path: str) -> None:
    """Run the example; write what it prints to ``path``."""
    with open(path, "w") as file, contextlib.redirect_stdout(file):
        offline.main(model, **OPTIONS)


def stream(model: str, path: str) -> None:
    """Put a prompt of two organisations to an `AsyncLLM`; write what is told of it to ``path``."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes": "64MiB"},
    }

    async def run() -> list[Any]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=model, kv_transfer_config=transfer, **OPTIONS)
        )
        cache, found, text = AsyncPromptCache(engine), [], ""
        for number, org in enumerate(("acme", "globex", "acme")):
            # The last one ends on this side of the engine.
            stop = [text[:1]] if number == 2 else []
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, stop=stop)
            outputs = [
                output
                async for output in cache.generate(
                    Prompt(HANDBOOK, CUTS, org=org), params, f"request {number}"
                )
            ]
            text = outputs[-1].output.outputs[0].text
            reason = outputs[-1].output.outputs[0].finish_reason
            first = outputs[0].cache
            assert first.prompt_tokens == len(HANDBOOK)
            found.append([reason, first.read_tokens, *told(outputs[-1:])])
        engine.shutdown()
        return found

    Path(path).write_text(json.dumps(asyncio.run(run())))


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `show_example` and `stream` have written."""
    scratch = tmp_path_factory.mktemp("prompt cache")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("CACHESCOPE_SECRET", raising=False)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        processes = [
            forks.process(target, str(tiny_model), str(scratch / target.__name__))
            for target in (show_example, stream)
        ]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return {path.name: path.read_text() for path in scratch.iterdir()}


def test_the_example_shows_what_it_says(written: dict[str, str]) -> None:
    printed = r"(\d+) tokens: read ({.*}), created ({.*}), uncached (\d+)"
    lines = [
        tuple(map(ast.literal_eval, line)) for line in re.findall(printed, written["show_example"])
    ]
    tokens, _, created, rest = lines[0]
    handbook, notes = created[3600], created[300]
    assert handbook > 8 * BLOCK and notes > 4 * BLOCK and handbook + notes + rest == tokens
    assert lines == [
        (tokens, {}, {3600: handbook, 300: notes}, rest),
        (tokens, {"device": handbook}, {300: notes}, rest),
        (tokens, {"device": handbook + notes}, {}, rest),
        (tokens, {"device": handbook + notes}, {}, rest),
    ]


def test_the_page_shows_the_example_that_runs() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/offline.md").read_text(), re.DOTALL)
    assert shown in (ROOT / "demo/offline.py").read_text()


def test_an_async_llm_streams_with_reports(written: dict[str, str]) -> None:
    assert json.loads(written["stream"]) == [
        ["length", 0, [{}, {"3600": 640, "300": 256}, 4]],
        ["length", 640, [{"device": 640}, {"300": 256}, 4]],
        ["stop", 896, [{"device": 896}, {}, 4]],
    ]
