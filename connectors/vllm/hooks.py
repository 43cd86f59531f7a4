"""What CacheScope takes hold of in vLLM, and whether a vLLM has it: read in its source, not run.

The table stands here and not where each thing is used, so that a vLLM can be looked at before
anything is started, and one that cannot be run here at all.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from vllm_cachescope.connectors.vllm.findings import Finding, Status

_CONNECTOR = "distributed/kv_transfer/kv_connector/v1"
_METRICS = f"{_CONNECTOR}/offloading/metrics.py"
_SCHEDULER = f"{_CONNECTOR}/offloading/scheduler.py"
_EVENTS = f"{_CONNECTOR}/offloading/events.py"
_COPIES = [f"{way}_{what}" for way in ("load", "store") for what in ("bytes", "time", "size")]
_OFFLOADING = f"{_CONNECTOR}/offloading_connector.py"


@dataclass(frozen=True, slots=True)
class Hook:
    """One place in vLLM that CacheScope takes hold of.

    Attributes:
        name: what it is.
        without: what happens on a vLLM that does not have it.
        functions: by file and qualified name, the parameters that are passed by position or must
            be accepted, in order; more may follow.
        texts: by file, what must stand there.
        is_needed: whether nothing works without it.
    """

    name: str
    without: str
    functions: Mapping[tuple[str, str], str]
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_needed: bool = True


_STOPS = "the engine does not start"

HOOKS = (
    Hook(
        "block hashes",
        "the engine refuses to start, since tenants would share blocks",
        {
            ("v1/core/kv_cache_utils.py", "generate_block_hash_extra_keys"): (
                "request start_token_idx end_token_idx start_mm_idx"
            ),
            ("v1/core/kv_cache_utils.py", "get_request_block_hasher"): (
                "hash_block_size caching_hash_fn"
            ),
        },
    ),
    Hook(
        "device tier",
        _STOPS,
        {
            ("v1/core/kv_cache_manager.py", "KVCacheManager.get_computed_blocks"): "self request",
            ("v1/core/kv_cache_manager.py", "KVCacheManager.allocate_slots"): (
                "self request num_new_tokens"
            ),
            ("v1/core/block_pool.py", "BlockPool.evict_blocks"): "self block_ids",
            ("v1/core/block_pool.py", "BlockPool.get_new_blocks"): "self num_blocks",
            ("v1/core/block_pool.py", "BlockHashToBlockMap.get_one_block"): "self key",
            ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.remove"): "self block",
            ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.prepend_n"): "self blocks",
            ("v1/core/kv_cache_utils.py", "FreeKVCacheBlockQueue.append_n"): "self blocks",
        },
        {
            "v1/core/block_pool.py": (
                "self.metrics_collector.on_block_evicted(block)",
                "self.free_block_queue.popleft_n(num_blocks)",
            ),
            "v1/core/kv_cache_utils.py": (
                "self.fake_free_list_head.next_free_block",
                "self.fake_free_list_tail",
            ),
            "v1/core/sched/scheduler.py": (
                "self.kv_cache_manager.get_computed_blocks(request",
                "self.kv_cache_manager.allocate_slots(",
            ),
        },
    ),
    Hook(
        "KV connector",
        _STOPS,
        {
            (f"{_CONNECTOR}/base.py", "KVConnectorBase_V1.bind_kv_cache_manager"): (
                "self kv_cache_manager"
            ),
            (f"{_CONNECTOR}/base.py", "KVConnectorBase_V1.on_new_request"): "self request",
            (_OFFLOADING, "OffloadingConnector.__init__"): "self vllm_config role kv_cache_config",
            (_OFFLOADING, "OffloadingConnector.get_num_new_matched_tokens"): (
                "self request num_computed_tokens"
            ),
            (_OFFLOADING, "OffloadingConnector.update_state_after_alloc"): (
                "self request blocks num_external_tokens"
            ),
            (_OFFLOADING, "OffloadingConnector.build_connector_meta"): "self scheduler_output",
            (_OFFLOADING, "OffloadingConnector.request_finished"): "self request block_ids",
            (_OFFLOADING, "OffloadingConnector.request_finished_all_groups"): (
                "self request block_ids"
            ),
            (_OFFLOADING, "OffloadingConnector.has_pending_push_work"): "self",
            (_OFFLOADING, "OffloadingConnector.get_kv_connector_stats"): "self",
            (_OFFLOADING, "OffloadingConnector.build_prom_metrics"): (
                "cls vllm_config metric_types labelnames per_engine_labelvalues"
            ),
            (_METRICS, "OffloadPromMetrics.__init__"): (
                "self vllm_config metric_types labelnames per_engine_labelvalues"
            ),
            (_METRICS, "OffloadPromMetrics._increase_counter"): (
                "self metric_name value labelvalues engine_idx"
            ),
            (_METRICS, "OffloadPromMetrics._get_prometheus_metric"): (
                "self metric_name labelvalues engine_idx"
            ),
        },
        {
            _METRICS: tuple(f'"vllm:kv_offload_{name}"' for name in _COPIES),
            _SCHEDULER: ("self._connector_stats = OffloadingConnectorStats()",),
            # What prompts of other front ends carry.
            "v1/request.py": ("self.cache_salt", "self.session_id", "self.kv_hints"),
        },
    ),
    Hook(
        "idle engine",
        "behind other front ends than ours an idle engine shows what has expired until the next "
        "request",
        {("v1/engine/core.py", "EngineCoreProc.run_busy_loop"): "self"},
        {"v1/engine/core.py": ("self.input_queue =", "EngineCoreRequestType.WAKEUP")},
        is_needed=False,
    ),
    Hook(
        "CPU tier",
        _STOPS,
        {
            ("v1/kv_offload/tiering/spec.py", "TieringOffloadingSpec.get_manager"): "self",
            ("v1/kv_offload/tiering/manager.py", "TieringOffloadingManager.lookup"): (
                "self key req_context"
            ),
            ("v1/kv_offload/tiering/manager.py", "TieringOffloadingManager.prepare_store"): (
                "self keys req_context"
            ),
            ("v1/kv_offload/cpu/manager.py", "CPUOffloadingManager._free_chunk"): "self chunk",
            ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.insert"): "self key chunk",
            ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.evict"): "self n protected",
            ("v1/kv_offload/cpu/policies/base.py", "CachePolicy.on_store_miss"): (
                "self keys req_context"
            ),
            ("v1/kv_offload/cpu/shared_offload_region.py", "SharedOffloadRegion.__init__"): (
                "self engine_id num_chunks rank kv_bytes_per_chunk cpu_page_size"
            ),
            ("v1/kv_offload/base.py", "OffloadingWorker.submit_load"): (
                "self job_id src_spec dst_spec"
            ),
        },
        {
            "v1/kv_offload/cpu/manager.py": (
                "self._num_evictable_cache_chunks",
                "self._num_chunks",
                "self._policy",
            ),
        },
    ),
    Hook(
        "KV events",
        _STOPS,
        {
            (_EVENTS, "OffloadingEventsTracker.take_events"): "self events",
            (_EVENTS, "OffloadingEventsTracker._build_event_metadata"): (
                "self req group_config chunk_idx"
            ),
        },
        {
            _SCHEDULER: ("self._events_tracker",),
            _EVENTS: (
                "self.self_describing_enabled",
                "self._pending_event_metadata",
                "meta.active_residencies",
            ),
        },
    ),
    Hook(
        "promotions",
        "what remote tiers hold is computed again where the CPU tier has no room at once",
        {
            (_SCHEDULER, "RequestOffloadState.update_offload_keys"): "self",
            ("v1/kv_offload/cpu/manager.py", "CPUOffloadingManager._get_num_free_chunks"): "self",
        },
        {_SCHEDULER: ("self._req_status",)},
        is_needed=False,
    ),
    Hook(
        "demotions",
        "with eviction.hierarchy: exclusive the engine stops at its first eviction",
        {
            (_SCHEDULER, "OffloadingConnectorScheduler._generate_job_id"): "self",
            ("v1/kv_offload/base.py", "GPULoadStoreSpec.__init__"): (
                "self block_ids group_sizes block_indices"
            ),
            (_OFFLOADING, "OffloadingConnector.handle_preemptions"): "self kv_connector_metadata",
            (_OFFLOADING, "OffloadingConnector.reset_cache"): "self",
        },
        {
            f"{_CONNECTOR}/offloading/common.py": (
                "jobs_to_flush: set[int] | None = None",
                "completed_jobs: dict[int, int]",
            ),
            # What is to be flushed is copied before anything is computed.
            f"{_CONNECTOR}/offloading/worker.py": (
                "kv_connector_metadata.store_jobs.pop(job_id, None)",
            ),
        },
        is_needed=False,
    ),
    Hook(
        "streams",
        "a prompt that the CPU tier cannot hold reads no more than one part of it",
        {
            (_OFFLOADING, "OffloadingConnector.update_connector_output"): "self connector_output",
            ("v1/core/kv_cache_manager.py", "KVCacheManager.cache_blocks"): (
                "self request num_computed_tokens"
            ),
            ("v1/core/kv_cache_manager.py", "KVCacheManager.free"): "self request",
        },
        {
            "v1/core/kv_cache_coordinator.py": (
                "def get_num_blocks_to_allocate(\n        self,\n        request_id: str,",
            ),
            # A request without computed tokens is looked up, whatever has become of it before.
            "v1/core/sched/scheduler.py": (
                "if request.num_computed_tokens == 0:",
                "self.connector.update_connector_output(kv_connector_output)",
                "self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)",
            ),
        },
        is_needed=False,
    ),
    Hook(
        "API server",
        "the server does not start; offline, prompts are cached with your defaults",
        {
            ("v1/engine/async_llm.py", "AsyncLLM.generate"): (
                "self prompt sampling_params request_id"
            ),
            ("v1/engine/core_client.py", "AsyncMPClient.call_utility_async"): "self method",
            ("v1/engine/core_client.py", "SyncMPClient.call_utility"): "self method",
            ("renderers/online_renderer.py", "OnlineRenderer.render_chat"): "self request",
            ("renderers/online_renderer.py", "OnlineRenderer.render_responses"): "self request",
            (
                "entrypoints/anthropic/serving.py",
                "AnthropicServingMessages.to_chat_completion_request",
            ): "cls anthropic_request",
        },
        {
            "entrypoints/launchers/api_server/entry.py": ("build_app", "init_app_state"),
            "entrypoints/launchers/api_server/app_state.py": ("state.online_renderer =",),
            "entrypoints/generate/api_router.py": ("state.anthropic_serving_messages =",),
        },
    ),
    Hook(
        "media ids",
        "the server does not start",
        {},
        {
            "renderers/base.py": (
                "await self._process_multimodal_async(",
                'mm_uuids=prompt.get("multi_modal_uuids")',
            ),
        },
    ),
    Hook(
        "LoRA adapters",
        _STOPS,
        {
            ("v1/engine/core.py", "EngineCore.add_lora"): "self lora_request",
            ("v1/engine/core.py", "EngineCore.list_loras"): "self",
            ("lora/utils.py", "get_adapter_absolute_path"): "lora_path",
        },
    ),
    Hook(
        "names in remote tiers",
        _STOPS,
        {
            ("config/utils.py", "get_hash_factors"): "config ignored_factors",
            ("config/utils.py", "normalize_value"): "x",
        },
    ),
    Hook(
        "rendering",
        "breakpoints in the history are found by tokenising more",
        {
            ("renderers/base.py", "BaseRenderer.tokenize_prompts_async"): "self prompts params",
            ("renderers/base.py", "BaseRenderer.tokenize_prompts"): "self prompts params",
        },
        is_needed=False,
    ),
    Hook(
        "traces",
        "spans of requests go without usage",
        {
            ("tracing/__init__.py", "instrument_manual"): (
                "span_name start_time end_time attributes context kind"
            ),
            ("tracing/otel.py", "extract_trace_context"): "headers",
        },
        {"v1/engine/output_processor.py": ("        instrument_manual(",)},
        is_needed=False,
    ),
    Hook(
        "start-up",
        _STOPS,
        {("engine/arg_utils.py", "EngineArgs.create_engine_config"): "self"},
    ),
)

_ALSO_PASSED = {"CachePolicy.insert": {"req_context"}}
"""Parameters that some releases require, and that ours take."""


def check(source: Path) -> Iterator[Finding]:
    """Yield for each hook whether vLLM has what it takes hold of.

    Args:
        source: vLLM's package directory.
    """
    for hook in HOOKS:
        problems = [
            problem
            for problem in (
                *(misfit(source, *where, wanted) for where, wanted in hook.functions.items()),
                *(missing(source, file, text) for file, ts in hook.texts.items() for text in ts),
            )
            if problem is not None
        ]
        if problems:
            status = Status.FAILURE if hook.is_needed else Status.WARNING
            found = f"{'; '.join(problems)}: {hook.without}"
            yield Finding(f"hook: {hook.name}", status, found, "a vLLM that CacheScope was run on")
        else:
            yield Finding(f"hook: {hook.name}", Status.OK, "it binds")


def misfit(source: Path, file: str, name: str, wanted: str) -> str | None:
    """Return why a function does not take what we give it; None if it does.

    Args:
        source: vLLM's package directory.
        file: the file in it.
        name: the function's qualified name.
        wanted: the parameters, as in `Hook.functions`.
    """
    arguments = _functions(source / file).get(name)
    if arguments is None:
        return f"{file} has no {name}"
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    expected = wanted.split()
    required = names[: len(names) - len(arguments.defaults)]
    unknown = set(required) - {*expected, *_ALSO_PASSED.get(name, ())}
    if names[: len(expected)] != expected or unknown:
        return f"{name} takes ({', '.join(names)}) in place of ({', '.join(expected)})"
    return None


def missing(source: Path, file: str, text: str) -> str | None:
    """Return that ``file`` does not do what we rely on; None if ``text`` stands there."""
    path = source / file
    if path.exists() and text in path.read_text():
        return None
    return f"{file} has no {text!r}"


@cache
def _functions(path: Path) -> dict[str, ast.arguments]:
    """Return the arguments of every function and method in a source file, by qualified name."""
    found: dict[str, ast.arguments] = {}
    for node in ast.parse(path.read_text()).body if path.exists() else ():
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + member.name] = member.args
    return found
