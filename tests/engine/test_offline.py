"""Engines without an API server: `LLM`, for text and for embeddings, reads as much as plain vLLM
does, and keeps apart whoever a plan keeps apart; `PromptCache` makes such plans."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.config_files import in_file
from tests.engine import forks, marked_prompts
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import BLOCK, FORGED, SECRET, org_plan, sealed
from tests.engine.server import ENVIRONMENT, ONE_PROCESS
from vllm_cachescope import PromptCache
from vllm_cachescope.config import ConfigError

pytestmark = pytest.mark.engine

HANDBOOK = list(range(300, 1200))
PROMPTS = [HANDBOOK, [*HANDBOOK, *range(1200, 1300)], HANDBOOK[:500], HANDBOOK]
READ = [0, 896, 384, 896]
"""What plain vLLM reads of 900, 1,000, 500 and 900 tokens, in blocks of 128."""


TOLD: dict[str, Any] = {
    "cold": [[{}, {"3600": 640, "300": 256}, 4], [{"device": 640}, {"300": 256}, 4]],
    "hot": [[{"device": 896}, {}, 4], [{"device": 896}, {}, 4]],
}
"""What `PromptCache` tells of a prompt of two organisations, twice: 640 of its 900 tokens are
global for an hour, the other blocks are each organisation's for five minutes."""


def ask(model: str, runner: str, has_plugin: bool, path: str) -> None:
    """Put prompts to an `LLM`; write what each of them read to ``path``."""
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    transfer = {
        "kv_connector": "DrivenConnector",
        "kv_connector_module_path": "tests.engine.clock",
        "kv_role": "kv_both",
        "kv_connector_extra_config": in_file({"cpu_bytes": "64MiB", "secret": SECRET}),
    }
    llm = LLM(
        model,
        runner=runner,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        num_gpu_blocks_override=64,
        distributed_executor_backend=ONE_PROCESS[1],
        enable_prefix_caching=True,
        kv_transfer_config=transfer if has_plugin else None,
    )

    def read(tokens: list[int], params: dict[str, Any] | None = None) -> int:
        prompt = {"prompt_token_ids": tokens}
        if runner == "pooling":
            pooling = PoolingParams(extra_kwargs=params)
            (output,) = llm.encode([prompt], pooling, pooling_task="embed", use_tqdm=False)
        else:
            extra = None if params is None else {"kv_transfer_params": params}
            sampling = SamplingParams(max_tokens=2, extra_args=extra)
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
            assert params is not None or output.kv_transfer_params is None
        return output.num_cached_tokens or 0

    found: dict[str, Any] = {"read": [read(tokens) for tokens in PROMPTS]}
    if has_plugin:
        acme = sealed(org_plan("acme", HANDBOOK))
        found["acme"] = [read(HANDBOOK, acme) for _ in range(2)]
        found["forged"] = [read(HANDBOOK, FORGED) for _ in range(2)]
        found["no plan"] = [read(HANDBOOK, {"compressed_token_type_ids": None})]
    llm.reset_prefix_cache()
    found["again"] = [read(HANDBOOK)]
    if runner == "generate":
        beams = BeamSearchParams(beam_width=3, max_tokens=4)
        (output,) = llm.beam_search([{"prompt_token_ids": HANDBOOK}], beams)
        found["beams"] = [beam.tokens for beam in output.sequences]
    if not has_plugin:
        with pytest.raises(ConfigError, match='"kv_connector": "CacheScopeConnector"'):
            PromptCache(llm)
    elif runner == "pooling":
        found["marked"] = marked_prompts.embed(llm)
    else:
        found["marked"] = marked_prompts.generate(llm, Clock(Path(os.environ[VARIABLE])))
    Path(path).write_text(json.dumps(found))


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_an_llm_reads_what_plain_vllm_reads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "clock"))
    paths = {has_plugin: tmp_path / f"plugin {has_plugin}" for has_plugin in (False, True)}
    processes = [
        forks.process(ask, str(tiny_model), runner, has_plugin, str(path))
        for has_plugin, path in paths.items()
    ]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    plain, ours = (json.loads(path.read_text()) for path in paths.values())
    assert plain.pop("beams", None) == ours.pop("beams", None)
    assert plain == {"read": READ, "again": [0]}
    marked = ours.pop("marked")
    assert {name: marked.pop(name) for name in TOLD} == TOLD
    if runner == "generate":
        check_generated(marked)
    assert ours == {
        "read": READ,
        "acme": [0, 896],
        "forged": [0, 0],
        "no plan": [896],
        "again": [896],  # From the CPU tier.
    }


def check_generated(found: dict[str, Any]) -> None:
    """See that `marked_prompts.generate` has found what it should."""
    hot = [{"device": 896}, {}, 4]
    (text_cold, text_hot), (chat_cold, chat_hot) = found.pop("text"), found.pop("chat")
    shared = found.pop("text tokens") // BLOCK * BLOCK
    assert text_cold[:2] == [{}, {"300": shared}] and text_hot[0] == {"device": shared}
    (*chat_cold, rest), chat_tokens = chat_cold
    (system,) = chat_cold[1].values()
    assert chat_cold == [{}, {"3600": system}]
    assert chat_hot == [[{"device": system}, {}, rest], chat_tokens]
    assert system >= shared and system + rest == chat_tokens
    assert found == {
        "same tokens": True,
        "expired": TOLD["cold"][1:],
        "from the CPU tier": [[{"cpu": 896}, {}, 4]],
        "sessions": [[{}, {"300": 512}, 388], [{}, {"300": 512}, 388], hot],
        "unmarked": [hot],
        "unmarked, of another": [[{}, {"300": 896}, 4]],
        "samples": [2, [hot]],
        "stopped": ["stop", [hot]],
        "each its own": [3, 1],
        "mistakes": [
            "BadRequest: prompts[1].breakpoints[0].ttl: '1y' is not allowed here; "
            "allowed: one of 5m, 30m, 1h, 12h, 24h",
            "BadRequest: conversations[0].messages[0].content[0].cache_control.ttl: '1y' is not "
            "allowed here; allowed: one of 5m, 30m, 1h, 12h, 24h",
            "ValueError: there are 2 prompts and parameters for 1",
            "RuntimeError: prompts are enqueued; call the LLM's wait_for_completion first",
        ],
    }
