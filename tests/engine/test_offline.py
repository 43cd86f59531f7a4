"""Engines without an API server: `LLM`, for text and for embeddings, reads as much as plain vLLM
does, and keeps apart whoever a plan keeps apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import forks
from tests.engine.engine import FORGED, SECRET, org_plan, sealed
from tests.engine.server import ENVIRONMENT, ONE_PROCESS
from vllm_cachescope.config import CONNECTOR

pytestmark = pytest.mark.engine

HANDBOOK = list(range(300, 1200))
PROMPTS = [HANDBOOK, [*HANDBOOK, *range(1200, 1300)], HANDBOOK[:500], HANDBOOK]
READ = [0, 896, 384, 896]
"""What plain vLLM reads of 900, 1,000, 500 and 900 tokens, in blocks of 128."""


def ask(model: str, runner: str, has_plugin: bool, path: str) -> None:
    """Put prompts to an `LLM`; write what each of them read to ``path``."""
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes": "64MiB", "secret": SECRET},
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

    found = {"read": [read(tokens) for tokens in PROMPTS]}
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
    Path(path).write_text(json.dumps(found))


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_an_llm_reads_what_plain_vllm_reads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
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
    assert ours == {
        "read": READ,
        "acme": [0, 896],
        "forged": [0, 0],
        "no plan": [896],
        "again": [896],  # From the CPU tier.
    }
