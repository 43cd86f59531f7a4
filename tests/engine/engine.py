"""A real vLLM engine in the tests' own process, stepped by hand."""

import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.config_files import in_file
from tests.engine import in_process
from tests.engine.clock import VARIABLE, Clock
from vllm_cachescope.cache.report import Report
from vllm_cachescope.prompt.plan import PLAN_KEY, Plan, Span, seal
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

SECRET = "the secret of the tests"
BLOCK = 128
"""Tokens per block, on the device and in the CPU tier."""
BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * BLOCK
"""Keys and values, of 2 layers with 2 heads of 32 numbers in float32."""

DEVICE_BLOCKS = 63
CPU_CHUNKS = 128
MAX_TOKENS_PER_STEP = 256
MAX_REQUESTS = 8
VOCABULARY = range(300, 2048)

Cut = tuple[int, Scope, int] | tuple[int, Scope, int, bool]
"""End in tokens, scope, lifetime in seconds, and whether a breakpoint covers it (default: yes)."""

_nonces = itertools.count()
KEYS = ScopeKeys(SECRET.encode())
OWNERS = OwnerTags(SECRET.encode())


def plan(caller: Caller, *cuts: Cut) -> Plan:
    """Return the plan that the API side would make for ``caller``."""
    nonce = f"nonce {next(_nonces)}"
    spans = []
    for end, scope, ttl_s, *covered in cuts:
        readable = scope is not Scope.SESSION or caller.session is not None
        key = KEYS.key(scope, caller, nonce)
        spans.append(Span(end, scope, key, ttl_s, readable and (not covered or covered[0])))
    return Plan(tuple(spans), nonce, OWNERS.of(caller))


def org_plan(org: str, tokens: Sequence[int], ttl_s: int = 300) -> Plan:
    """Return a plan that shares all of ``tokens`` inside ``org``."""
    return plan(Caller(org), (len(tokens), Scope.ORG, ttl_s))


def sealed(plan: Plan) -> dict[str, Any]:
    """Return the `kv_transfer_params` that carry ``plan`` to the engine."""
    return {PLAN_KEY: seal(plan, SECRET.encode()), "max_offload_tokens": plan.covered_tokens}


FORGED: dict[str, Any] = {PLAN_KEY: {}}
"""The `kv_transfer_params` of a prompt that shares nothing: what stands there is no plan."""


def draw_tokens(chance: random.Random, count: int) -> list[int]:
    """Return ``count`` random token ids."""
    return chance.choices(VOCABULARY, k=count)


def draw_prompt(
    chance: random.Random, earlier: list[tuple[list[int], list[Cut]]], longest: int
) -> tuple[list[int], list[Cut]]:
    """Return a random prompt of up to ``longest`` tokens and cuts for its plan; mostly one that
    begins as one of ``earlier`` does, or is just that. It is put into ``earlier``."""
    tokens = draw_tokens(chance, chance.randrange(20, longest))
    cuts: list[Cut] = []
    if earlier and chance.random() < 0.8:
        tokens, cuts = chance.choice(earlier[-12:])
        if chance.random() < 0.6:
            end = chance.randrange(1, len(tokens) + 1)
            tokens = (tokens[:end] + draw_tokens(chance, chance.randrange(1, 300)))[:longest]
    if not cuts or chance.random() < 0.2:
        count = chance.randrange(1, 4)
        ends = [chance.randrange(1, len(tokens) + 1) for _ in range(count)]
        # On a block's edge and next to it is where mistakes would be.
        ends = [
            chance.choice([end, max(end // BLOCK * BLOCK + chance.choice([-1, 0, 1]), 1)])
            for end in ends
        ]
        scopes = sorted(chance.choices(list(Scope), k=count))
        ttls = sorted(chance.choices([300, 3600], k=count), reverse=True)
        covered = [True] * (count - 1) + [chance.random() < 0.8]
        cuts = list(zip(sorted(ends), scopes, ttls, covered, strict=True))
    inner = {cut[0]: cut for cut in cuts[:-1] if cut[0] < len(tokens)}
    cuts = [*inner.values(), (len(tokens), *cuts[-1][1:])]
    earlier.append((tokens, cuts))
    return tokens, cuts


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt to put to the engine.

    Attributes:
        tokens: the prompt.
        params: its `kv_transfer_params`; None for none.
        max_tokens: tokens to generate.
        salt: its `cache_salt`; empty for none.
        adapter: directory of the LoRA adapter to generate with; None for none.
        session: its `session_id`; None for none.
        hints: the actions in its `kv_hints`, each with type, version and payload.
    """

    tokens: list[int]
    params: dict[str, Any] | None
    max_tokens: int = 8
    salt: str = ""
    adapter: Path | None = None
    session: str | None = None
    hints: tuple[tuple[str, str, Any], ...] = ()


@dataclass(slots=True)
class Answer:
    """What the engine did with an `Ask`.

    Attributes:
        tokens: what it generated, greedily.
        read: prompt tokens that came from the cache, as vLLM counts them.
        created: prompt tokens that were newly cached, as vLLM counts them.
        report: the connector's report; None where there is none.
    """

    tokens: list[int] = field(default_factory=list)
    read: int = 0
    created: int = 0
    report: Report | None = None

    def outcome(self, name: str) -> int:
        """Return the prompt tokens with the outcome ``name``."""
        assert self.report is not None
        return self.report.tokens(name)


class Engine:
    """A vLLM engine with the tests' connector. Greedy, in float32: with the exact model of the
    tests no rounding decides between two tokens, however requests are batched.

    Args:
        model: the model's directory.
        scratch: where the clock's file goes.
        cpu_chunks: chunks that the CPU tier holds.
        config: further keys of CacheScope's configuration.
        options: further engine arguments.
    """

    def __init__(
        self,
        model: Path,
        scratch: Path,
        cpu_chunks: int = CPU_CHUNKS,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        os.environ[VARIABLE] = str(scratch / "clock")
        self.clock = Clock(scratch / "clock")
        os.environ |= {
            **in_process.ENVIRONMENT,
            # It keeps a kernel for each shape of batch it has seen: hundreds of MB, by and by.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
        }
        import torch
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # The model is so small that threads would mostly wait for each other.
        torch.set_num_threads(1)
        self.args = EngineArgs(
            model=str(model),
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=MAX_TOKENS_PER_STEP,
            max_num_seqs=MAX_REQUESTS,
            disable_log_stats=False,
            kv_transfer_config={
                "kv_connector": "DrivenConnector",
                "kv_connector_module_path": "tests.engine.clock",
                "kv_role": "kv_both",
                "kv_connector_extra_config": in_file(
                    {"cpu_bytes": cpu_chunks * BLOCK_BYTES, "secret": SECRET, **(config or {})}
                ),
            },
            **{"dtype": "float32", "num_gpu_blocks_override": DEVICE_BLOCKS + 1, **options},
        )
        self._engine = LLMEngine.from_engine_args(self.args)
        self.scheduler = self._engine.engine_core.engine_core.scheduler
        self.connector = self.scheduler.connector
        self._ids = itertools.count()
        self._answers: dict[str, Answer] = {}

    def skew(self, seconds: float) -> None:
        """Let this process's time of day be wrong by ``seconds``."""
        time.time = lambda: time.time_ns() / 1e9 + seconds

    def stop(self) -> None:
        """Shut the engine down."""
        self._engine.engine_core.shutdown()

    def run(self, *asks: Ask) -> list[Answer]:
        """Put all ``asks`` to the engine at once; return its answers in their order."""
        ids = [self.add(ask) for ask in asks]
        while self.step():
            pass
        return [self._answers.pop(request_id) for request_id in ids]

    def ask(self, tokens: list[int], plan: Plan, max_tokens: int = 8) -> Answer:
        """Put one prompt to the engine."""
        (answer,) = self.run(Ask(tokens, sealed(plan), max_tokens))
        return answer

    def uncached(
        self, tokens: list[int], max_tokens: int = 8, adapter: Path | None = None
    ) -> list[int]:
        """Return what the engine generates for ``tokens`` when nothing is cached."""
        (answer,) = self.run(Ask(tokens, FORGED, max_tokens, adapter=adapter))
        assert answer.read == 0
        return answer.tokens

    def add(self, ask: Ask) -> str:
        """Queue a request; return its id. Nothing runs before `step`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request_id = str(next(self._ids))
        extra = {} if ask.params is None else {"kv_transfer_params": ask.params}
        self._answers[request_id] = Answer()
        self._engine.add_request(
            request_id,
            {"prompt_token_ids": ask.tokens} | ({"cache_salt": ask.salt} if ask.salt else {}),
            SamplingParams(
                temperature=0.0,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                extra_args=extra,
                output_kind=RequestOutputKind.CUMULATIVE,
            ),
            lora_request=None if ask.adapter is None else _lora(ask.adapter),
            session_id=ask.session,
            kv_hints=_envelope(ask.hints),
        )
        return request_id

    def load_adapter(self, directory: Path) -> None:
        """Load a LoRA adapter, in place of one that was loaded from there."""
        assert self._engine.add_lora(_lora(directory, load_inplace=True))

    def step(self) -> bool:
        """Run one step of the engine; return whether there is more to do."""
        for output in self._engine.step():
            answer = self._answers[output.request_id]
            answer.tokens = list(output.outputs[0].token_ids)
            answer.read = output.num_cached_tokens or 0
            answer.created = output.num_cache_creation_tokens or 0
            if output.kv_transfer_params:
                answer.report = Report.from_wire(output.kv_transfer_params[PLAN_KEY])
        return self._engine.has_unfinished_requests()

    def abort(self, request_id: str) -> None:
        """Give up a request that was queued with `add`."""
        self._engine.abort_request([request_id])
        del self._answers[request_id]

    def answer(self, request_id: str) -> Answer:
        """Return the answer to a finished request that was queued with `add`."""
        return self._answers.pop(request_id)

    def empty_device(self) -> None:
        """Empty vLLM's prefix cache, and no tier behind it."""
        assert self._engine.reset_prefix_cache(reset_connector=False)

    def empty(self) -> None:
        """Empty every tier."""
        assert self._engine.reset_prefix_cache(reset_connector=True)

    def resident(self) -> dict[tuple[str, int], int]:
        """Return how many entries each tier holds of each lifetime; zeros left out."""
        return {
            (tier, ttl_s): entries
            for tier, ttl_s, entries in self.connector.cachescope.resident()
            if entries
        }

    def device_bytes(self) -> int:
        """Return how many bytes of the device the prefix cache takes, by vLLM's own count."""
        manager = self.scheduler.kv_cache_manager
        config = manager.kv_cache_config
        blocks = len(manager.block_pool.cached_block_hash_to_block)
        return blocks * config.kv_cache_tensors[0].size // config.num_blocks

    def event_hashes(self) -> dict[str, set[int]]:
        """Return the hashes of what the device and the CPU tier hold, as KV events write them."""
        from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

        cpu = self.connector.connector_scheduler.manager.primary_tier
        keys = {
            "GPU": [
                block.block_hash
                for block in self.scheduler.kv_cache_manager.block_pool.blocks
                if block.block_hash is not None
            ],
            "CPU": cpu._policy.ready(),  # noqa: SLF001 — vLLM has no public list
        }
        return {
            medium: {maybe_convert_block_hash(get_block_hash(key)) for key in keys}
            for medium, keys in keys.items()
        }

    def ask_about(self, seed: int, text: str, plan: Plan) -> Answer:
        """Put a question about the picture ``seed`` to a model that sees; its plan may be longer
        than the prompt is."""
        import numpy as np
        from PIL import Image
        from vllm import SamplingParams

        pixels = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        request_id = str(next(self._ids))
        self._answers[request_id] = Answer()
        self._engine.add_request(
            request_id,
            {"prompt": text, "multi_modal_data": {"image": Image.fromarray(pixels)}},
            SamplingParams(
                temperature=0.0, max_tokens=1, extra_args={"kv_transfer_params": sealed(plan)}
            ),
        )
        while self.step():
            pass
        return self._answers.pop(request_id)

    def free_chunks(self) -> int:
        """Return how many chunks of the CPU tier are free, by vLLM's own count."""
        tier = self.connector.connector_scheduler.manager.primary_tier
        return tier._get_num_free_chunks()  # noqa: SLF001 — vLLM has no public count

    def counter(self, name: str, *values: str) -> float:
        """Return the sum of the engine's metric ``name`` over all labels, or where the labels have
        these ``values``."""
        from prometheus_client import REGISTRY

        return sum(
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == f"{name}_total" and {*values} <= {*sample.labels.values()}
        )


def _envelope(hints: Sequence[tuple[str, str, Any]]) -> Any:
    from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

    actions = [KvHintAction(str(i), *hint) for i, hint in enumerate(hints)]
    return KvHintsEnvelope("1.0", "message", actions) if actions else None


def _lora(directory: Path, **options: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(directory), **options)
