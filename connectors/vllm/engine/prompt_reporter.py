"""The reporter on prompts: what each of them read, created and missed."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from vllm.v1.request import Request

from vllm_cachescope.cache.eviction_history import EvictionHistory
from vllm_cachescope.cache.prefill_rate import PrefillRate
from vllm_cachescope.cache.prefix_hashes import hashes_of_blocks
from vllm_cachescope.cache.report import EngineId, Outcome, Report, attribute_tokens
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.miss_explainer import MissExplainer
from vllm_cachescope.connectors.vllm.engine.prompts import Prompt
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU


class PromptReporter:
    """Makes the reports of one engine's prompts.

    Args:
        layout: how prompts are cut into blocks.
        history: how far back the engine remembers.
        explainer: knows why blocks were not read.
        clock: the history's clock, in seconds.
        rank: the engine's number among those behind one API server, from 0.
        hash_settings: the settings that block hashes depend on; see `hashing.digest`.
        shared_tiers: names of the tiers that the engine shares with others.
        prefill_rate: how fast the engine computes prompts.
    """

    def __init__(
        self,
        layout: BlockLayout,
        history: EvictionHistory,
        explainer: MissExplainer,
        clock: Callable[[], float],
        rank: int,
        hash_settings: Mapping[str, Any],
        shared_tiers: Sequence[str],
        prefill_rate: PrefillRate,
    ) -> None:
        self._layout = layout
        self._history = history
        self._explainer = explainer
        self._clock = clock
        self._rank = rank
        self._epoch = secrets.token_hex(8)
        self._hash_settings = hash_settings
        self._shared_tiers = tuple(shared_tiers)
        self._prefill_rate = prefill_rate

    def note_read(self, prompt: Prompt, request: Request, external_tokens: int) -> None:
        """Note what a prompt reads when it is scheduled for the first time, or resumed, and what it
        misses.

        Args:
            prompt: the prompt.
            request: its request.
            external_tokens: tokens read from tiers behind the device, right behind the local ones.
        """
        prompt.read = [
            *_first(prompt.read or [], prompt.local_tokens),
            *self._external_reads(prompt, request, external_tokens),
        ]
        prompt.prefill_rate = self._prefill_rate.tokens_per_s
        layout = self._layout
        whole = request.num_prompt_tokens // layout.tokens_per_hash
        stride = layout.tokens_per_step // layout.tokens_per_hash
        hashes = list(islice(request.block_hashes, stride - 1, whole, stride))
        prompt.blocks = hashes_of_blocks(hashes, layout.tokens_per_step)
        prompt.misses, prompt.unasked = self._explainer.explain(
            prompt.plan, request, prompt.local_tokens + external_tokens
        )

    def report(self, prompt: Prompt) -> Report | None:
        """Return what has become of a prompt so far; None if it has not been scheduled yet."""
        if prompt.read is None:
            return None
        since, step = self._history.since, self._layout.tokens_per_step
        covered = prompt.plan.covered_tokens // step * step
        created = prompt.created.ranges(self._layout.groups, covered)
        report = attribute_tokens(prompt.plan, step, prompt.read, created)
        return replace(
            report,
            misses=prompt.misses,
            unasked=prompt.unasked,
            engine=self._engine_id(prompt.adapter),
            reach_s=None if since is None else self._clock() - since,
            computed_tokens=min(prompt.computed_tokens, prompt.plan.spans[-1].end),
            blocks=prompt.blocks,
            prefill_seconds_saved=report.read_tokens / prompt.prefill_rate
            if prompt.prefill_rate
            else None,
        )

    def _engine_id(self, adapter: str | None) -> EngineId:
        # Not at start-up: the digest is known once vLLM has begun to hash.
        digest = hashing.digest({**self._hash_settings, "adapter": adapter})
        return EngineId(self._rank, self._epoch, digest, self._shared_tiers)

    def _external_reads(
        self, prompt: Prompt, request: Request, tokens: int
    ) -> Iterable[tuple[str, int]]:
        """Return ``(outcome, tokens)`` of what is read behind the local tokens, in order."""
        if not prompt.promoted:
            return [(Outcome.READ_CPU, tokens)] if tokens else []
        position, last = prompt.local_tokens, prompt.local_tokens + tokens
        tiers: dict[tuple[int, int], str] = {}
        for start, end, key in self._layout.chunks(request, last):
            # Several groups have a key each for the same tokens. One that a remote tier was asked
            # for counts, rather than one that was in the CPU tier.
            tier = prompt.promoted.get(key)
            if tier is not None or (start, end) not in tiers:
                tiers[start, end] = tier or CPU
        read: list[tuple[str, int]] = []
        for (start, end), tier in sorted(tiers.items()):
            start, end = max(start, position), min(end, last)
            if start < end:
                read.append((Outcome.READ_CPU, start - position))
                read.append((f"read_{tier}", end - start))
                position = end
        read.append((Outcome.READ_CPU, last - position))
        return [(outcome, tokens) for outcome, tokens in read if tokens]


def _first(read: Sequence[tuple[str, int]], tokens: int) -> list[tuple[str, int]]:
    """Return how the first ``tokens`` tokens were read: as ``read`` says, and what lies behind
    from the device."""
    first: list[tuple[str, int]] = []
    for outcome, count in read:
        first.append((outcome, min(count, tokens)))
        tokens -= first[-1][1]
    return [*first, (Outcome.READ_DEVICE, tokens)]
