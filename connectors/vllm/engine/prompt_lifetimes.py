"""The lifetimes of prompts' blocks: they begin when a request computes a block or finds it, and
anew when one uses it."""

from collections import Counter
from collections.abc import Callable

from vllm.v1.request import Request

from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.counts import Read
from vllm_cachescope.connectors.vllm.engine.local_tiers import LocalTiers
from vllm_cachescope.connectors.vllm.engine.prompts import Prompt
from vllm_cachescope.prompt.plan import Plan


class PromptLifetimes:
    """Starts and refreshes the lifetimes of the blocks of prompts.

    Args:
        layout: how prompts are cut into blocks.
        ledger: has the lifetimes.
        local: the device and the CPU tier.
        clock: seconds, never running backwards: lifetimes run on it.
    """

    def __init__(
        self, layout: BlockLayout, ledger: Ledger, local: LocalTiers, clock: Callable[[], float]
    ) -> None:
        self._layout = layout
        self._ledger = ledger
        self._local = local
        self._clock = clock

    def register(
        self,
        prompt: Prompt,
        request: Request,
        tokens: int,
        known_only: bool = False,
        reads: Counter[Read] | None = None,
    ) -> bool:
        """Start or refresh the lifetimes of the blocks in a prompt's first ``tokens`` tokens, from
        ``prompt.registered`` on.

        Args:
            prompt: the prompt.
            request: its request.
            tokens: how many tokens of the prompt, from its start.
            known_only: whether to refresh lifetimes only, and to start none.
            reads: counts the blocks, as they were before; None for nothing to count.

        Returns:
            Whether the ledger knows all of these blocks now.
        """
        per_hash = self._layout.tokens_per_hash
        prompt.computed_tokens = max(tokens, prompt.computed_tokens)
        if tokens - prompt.registered < per_hash:
            return True
        now, all_known = self._clock(), True
        blocks = self._layout.blocks_of_all(request, prompt.registered, tokens)
        # From the last to the first, so that the end of a prefix is evicted first.
        for end, key, group in reversed(blocks):
            on_device, span = self._local.on_device(key), prompt.plan.span_of(end)
            if prompt.is_purged(end):
                if on_device and key not in self._ledger:
                    self._local.drop_purged(key, span.ttl_s)
                continue
            entry = self._ledger.get(key)
            if entry is None and (known_only or not on_device):
                all_known = False
                continue
            if reads is not None and entry is not None:
                reads[end <= prompt.local_tokens, entry.ttl_s, entry.expires_at] += 1
            owner = prompt.plan.owner_in(span)
            is_new = self._local.use(key, span.ttl_s, now, owner, prompt.plan.owner, on_device)
            if end <= request.num_prompt_tokens:
                prompt.created.note(group, end, is_new)
        self.note_change(prompt.plan)
        prompt.registered = tokens // per_hash * per_hash
        return all_known

    def refresh(self, prompt: Prompt, request: Request) -> None:
        """The request is over, and has used its blocks until now."""
        self._local.drop_expired()
        now = self._clock()
        prompt.used = [
            key for _, key, _ in self._layout.blocks_of_all(request, 0, prompt.registered)
        ]
        for key in reversed(prompt.used):
            if (entry := self._ledger.get(key)) is not None:
                self._ledger.touch(key, entry.ttl_s, now)

    def note_change(self, plan: Plan) -> None:
        """Note that a prompt's blocks came into the cache, into use, or out of it."""
        self._local.note_change({plan.owner_in(span) for span in plan.spans})
