"""The explainer of misses: why blocks that the engine had before were not read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vllm.v1.request import Request

from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionReason
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause, eviction_miss
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tiers.block_states import Absence
from vllm_cachescope.tiers.keyspace import qualified

MAX_MISSES = 32
"""How many misses a report lists at most; the last of them also counts the tokens that follow."""


class MissExplainer:
    """Asks the eviction history and the remote tiers about blocks that were not read.

    Args:
        layout: how prompts are cut into blocks.
        ledger: knows the blocks that are cached.
        history: knows how blocks left the device and the CPU tier.
        remotes: the remote tiers, nearest first.
        clock: the ledger's clock, in seconds.
    """

    def __init__(
        self,
        layout: BlockLayout,
        ledger: Ledger,
        history: EvictionHistory,
        remotes: Sequence[RemoteTierManager],
        clock: Callable[[], float],
    ) -> None:
        self._layout = layout
        self._ledger = ledger
        self._history = history
        self._remotes = remotes
        self._clock = clock

    def explain(
        self, plan: Plan, request: Request, read_tokens: int
    ) -> tuple[tuple[CacheMiss, ...], CacheMiss | None]:
        """Say why a prompt's tokens behind the first ``read_tokens`` were not read.

        Returns:
            The misses, in prompt order, up to the first block that this engine has never seen;
            and, where a remote tier could not be asked for that block, why, as a miss of 0 tokens.
        """
        size = self._layout.groups[0].tokens_per_block
        start = read_tokens // size * size
        whole = request.num_prompt_tokens // size * size
        if request.skip_reading_prefix_cache:
            return (CacheMiss(MissCause.NOT_LOOKED_UP, max(0, whole - start)),), None
        now = self._clock()
        misses: list[CacheMiss] = []
        lengths: list[int] = []
        unasked = None
        for end in range(start + size, whole + 1, size):
            missing = [k for k in self._layout.keys_at(request, end) if k not in self._ledger]
            if missing:
                miss = self._block_miss(plan, request, end, missing, size, now)
            else:
                # The block is cached. Behind a missing block it cannot be read, and is missed for
                # the same reason. Otherwise vLLM left the block out, since it has to compute the
                # prompt's last token: nothing is missing.
                miss = misses[-1] if misses else None
            if miss is None:
                unasked = self._unasked(plan, request, end)
                break
            if misses and (miss.continues(misses[-1]) or len(misses) == MAX_MISSES):
                lengths[-1] += size
            else:
                misses.append(miss)
                lengths.append(size)
        found = zip(misses, lengths, strict=True)
        return tuple(replace(miss, tokens=tokens) for miss, tokens in found), unasked

    def _block_miss(
        self,
        plan: Plan,
        request: Request,
        end: int,
        missing: Sequence[bytes],
        tokens: int,
        now: float,
    ) -> CacheMiss | None:
        """Return why the block that ends at ``end`` is missing; None if it was never seen.

        In this order:

        1. A remote tier found the block for this very request, and lost it while loading.
        2. The block expired. No tier may serve it, so none is asked.
        3. A remote tier was given the block once, and says why it has no copy.
        4. The block was evicted from the device or the CPU tier, and no remote tier knows it.

        Args:
            plan: the prompt's plan.
            request: the prompt's request.
            end: where the block ends, in tokens.
            missing: those of the block's keys that are not in the ledger; one for each group.
            tokens: tokens of the block.
            now: the time in seconds.
        """
        chunks = list(self._remote_chunks(plan, request, end))
        for remote, key in chunks:
            if (absence := remote.tier.load_failure(request.request_id, key)) is not None:
                return _absence_miss(remote, absence, tokens)
        # A model with several groups reads none of them if one is missing: the first whose
        # eviction is known explains the miss.
        records = (self._history.find(key) for key in missing)
        eviction = next((record for record in records if record is not None), None)
        if eviction is None or eviction.reason is not EvictionReason.TTL:
            for remote, key in chunks:
                absence = remote.tier.absence(request.request_id, key)
                if absence is not None and absence.certain:
                    return _absence_miss(remote, absence, tokens)
        return None if eviction is None else eviction_miss(eviction, tokens, now)

    def _unasked(self, plan: Plan, request: Request, end: int) -> CacheMiss | None:
        """Return why a remote tier could not be asked for the block that ends at ``end``; None if
        all of them were."""
        for remote, key in self._remote_chunks(plan, request, end):
            if (absence := remote.tier.absence(request.request_id, key)) is not None:
                return _absence_miss(remote, absence, 0)
        return None

    def _remote_chunks(
        self, plan: Plan, request: Request, end: int
    ) -> Iterator[tuple[RemoteTierManager, bytes]]:
        """Yield each remote tier with its key of the chunk that holds the block which ends at
        ``end``."""
        if not self._remotes or (chunk := self._layout.chunk_of(request, end)) is None:
            return
        chunk_end, key = chunk
        name = qualified(plan.owner_of(chunk_end), key)
        for remote in self._remotes:
            yield remote, name


def _absence_miss(remote: RemoteTierManager, absence: Absence, tokens: int) -> CacheMiss:
    return CacheMiss(absence.cause, tokens, remote.name, detail=absence.detail)
