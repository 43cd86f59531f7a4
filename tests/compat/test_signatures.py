"""What CacheScope takes hold of in vLLM is there, under its name and with its parameters.

Checked in the source of the installed vLLM, and of any other whose unpacked wheel
``CACHESCOPE_VLLM_SOURCE`` names: a release for other hardware cannot be run here, but be read.
"""

import ast
import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

SOURCES = {"installed": Path(importlib.util.find_spec("vllm").origin).parent}  # type: ignore[union-attr, arg-type]
if elsewhere := os.environ.get("CACHESCOPE_VLLM_SOURCE"):
    SOURCES["elsewhere"] = Path(elsewhere) / "vllm"

CONNECTOR = "distributed/kv_transfer/kv_connector/v1"
FUNCTIONS = {
    ("v1/core/kv_cache_utils.py", "generate_block_hash_extra_keys"): (
        "request start_token_idx end_token_idx start_mm_idx"
    ),
    ("v1/core/kv_cache_utils.py", "get_request_block_hasher"): "hash_block_size caching_hash_fn",
    ("v1/core/kv_cache_manager.py", "KVCacheManager.get_computed_blocks"): "self request",
    ("v1/core/block_pool.py", "BlockPool.evict_blocks"): "self block_ids",
    ("v1/core/block_pool.py", "BlockPool.get_new_blocks"): "self num_blocks",
    ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.remove"): "self block",
    ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.prepend_n"): "self blocks",
    ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.append_n"): "self blocks",
    ("v1/core/block_pool.py", "BlockHashToBlockMap.get_one_block"): "self key",
    (f"{CONNECTOR}/base.py", "KVConnectorBase_V1.bind_kv_cache_manager"): "self kv_cache_manager",
    (f"{CONNECTOR}/base.py", "KVConnectorBase_V1.on_new_request"): "self request",
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.__init__"): (
        "self vllm_config role kv_cache_config"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.get_num_new_matched_tokens"): (
        "self request num_computed_tokens"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.update_state_after_alloc"): (
        "self request blocks num_external_tokens"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.build_connector_meta"): (
        "self scheduler_output"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.request_finished"): (
        "self request block_ids"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.request_finished_all_groups"): (
        "self request block_ids"
    ),
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.has_pending_push_work"): "self",
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.get_kv_connector_stats"): "self",
    (f"{CONNECTOR}/offloading_connector.py", "OffloadingConnector.build_prom_metrics"): (
        "cls vllm_config metric_types labelnames per_engine_labelvalues"
    ),
    ("v1/kv_offload/tiering/spec.py", "TieringOffloadingSpec.get_manager"): "self",
    ("v1/kv_offload/tiering/manager.py", "TieringOffloadingManager.lookup"): "self key req_context",
    ("v1/kv_offload/tiering/manager.py", "TieringOffloadingManager.prepare_store"): (
        "self keys req_context"
    ),
    ("v1/kv_offload/cpu/manager.py", "CPUOffloadingManager._free_chunk"): "self chunk",
    ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.insert"): "self key chunk",
    ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.evict"): "self n protected",
    ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.on_store_miss"): "self keys req_context",
    ("v1/kv_offload/cpu/shared_offload_region.py", "SharedOffloadRegion.__init__"): (
        "self engine_id num_chunks rank kv_bytes_per_chunk cpu_page_size"
    ),
    ("v1/kv_offload/base.py", "OffloadingWorker.submit_load"): "self job_id src_spec dst_spec",
    ("v1/engine/async_llm.py", "AsyncLLM.generate"): "self prompt sampling_params request_id",
    ("v1/engine/core_client.py", "AsyncMPClient.call_utility_async"): "self method",
    ("v1/engine/core_client.py", "SyncMPClient.call_utility"): "self method",
    ("renderers/base.py", "BaseRenderer.tokenize_prompts_async"): "self prompts params",
    ("renderers/base.py", "BaseRenderer.tokenize_prompts"): "self prompts params",
    ("renderers/online_renderer.py", "OnlineRenderer.render_chat"): "self request",
    ("v1/engine/core.py", "EngineCore.add_lora"): "self lora_request",
    ("v1/engine/core.py", "EngineCore.list_loras"): "self",
    ("lora/utils.py", "get_adapter_absolute_path"): "lora_path",
    ("config/utils.py", "get_hash_factors"): "config ignored_factors",
    ("config/utils.py", "normalize_value"): "x",
    ("renderers/online_renderer.py", "OnlineRenderer.render_responses"): "self request",
    ("entrypoints/anthropic/serving.py", "AnthropicServingMessages.to_chat_completion_request"): (
        "cls anthropic_request"
    ),
}
"""The parameters that are passed by position or must be accepted, in order; more may follow."""

TEXTS = {
    "v1/core/block_pool.py": [
        "self.metrics_collector.on_block_evicted(block)",
        "self.free_block_queue.popleft_n(num_blocks)",
    ],
    "v1/core/kv_cache_utils.py": [
        "self.fake_free_list_head.next_free_block",
        "self.fake_free_list_tail",
    ],
    "v1/kv_offload/cpu/manager.py": [
        "self._num_evictable_cache_chunks",
        "self._num_chunks",
        "self._policy",
    ],
    "v1/core/sched/scheduler.py": ["self.kv_cache_manager.get_computed_blocks(request"],
    "renderers/base.py": [
        "await self._process_multimodal_async(",
        'mm_uuids=prompt.get("multi_modal_uuids")',
    ],
    "entrypoints/launchers/api_server/app_state.py": ["state.online_renderer ="],
    "entrypoints/generate/api_router.py": ["state.anthropic_serving_messages ="],
}


@cache
def functions(path: Path) -> dict[str, ast.arguments]:
    """Return the arguments of every function and method in a source file, by qualified name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + member.name] = member.args
    return found


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(
    ("where", "wanted"), FUNCTIONS.items(), ids=[name for _, name in FUNCTIONS]
)
def test_a_function_takes_what_we_give_it(
    source: Path, where: tuple[str, str], wanted: str
) -> None:
    file, name = where
    arguments = functions(source / file).get(name)
    assert arguments is not None, f"{file} has no {name}"
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    expected = wanted.split()
    assert names[: len(expected)] == expected
    optional = len(arguments.defaults)
    required = names[: len(names) - optional] if optional else names
    # `CachePolicy.insert` has one more from 0.33 on, which ours accepts.
    assert set(required) <= {*expected, "req_context"}, "a parameter we do not give"


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("file", TEXTS)
def test_a_file_still_does_what_we_rely_on(source: Path, file: str) -> None:
    text = (source / file).read_text()
    for wanted in TEXTS[file]:
        assert wanted in text
