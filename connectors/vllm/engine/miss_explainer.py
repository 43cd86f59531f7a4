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
        size = self._layout.tokens_per_step
        start = read_tokens // size * size
        whole = request.num_prompt_tokens // size * size
        if request.skip_reading_prefix_cache:
            return (CacheMiss(MissCause.NOT_LOOKED_UP, max(0, whole - start)),), None
        now = self._clock()
        misses = _Misses(size)
        unasked = None
        for end in range(start + size, whole + 1, size):
            missing = [k for k in self._layout.keys_at(request, end) if k not in self._ledger]
            lost, windows = self._layout.split(missing)
            if lost:
                miss = self._block_miss(plan, request, end, lost, size, now)
                if miss is None:
                    unasked = self._unasked(plan, request, end)
                    break
                misses.add(miss)
            elif misses.found:
                # The block is cached. Behind a missing block it cannot be read, and is missed for
                # the same reason.
                misses.add(misses.found[-1])
            elif (miss := self._window_miss(windows, size, now)) is not None:
                misses.add_window(miss)
            elif self._layout.has_checkpoints and end < request.num_prompt_tokens:
                misses.wait()
            # Otherwise vLLM left the block out, since it has to compute the prompt's last token:
            # nothing is missing.
        return misses.listed(), unasked

    def _window_miss(self, missing: Sequence[bytes], tokens: int, now: float) -> CacheMiss | None:
        """Return why a prompt could not be resumed behind a block that full attention has; None if
        no window was ever kept there.

        Args:
            missing: the keys of windows that are not in the ledger.
            tokens: tokens of the block.
            now: the time in seconds.
        """
        records = (self._history.find(key) for key in missing)
        eviction = next((record for record in records if record is not None), None)
        return None if eviction is None else eviction_miss(eviction, tokens, now)

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
            missing: those of the block's keys that are not in the ledger, without windows'.
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
        """Yield each remote tier with its keys of the chunks that hold the block which ends at
        ``end``."""
        if not self._remotes:
            return
        for chunk_end, key in self._layout.chunks_at(request, end):
            name = qualified(plan.owner_of(chunk_end), key)
            for remote in self._remotes:
                yield remote, name


class _Misses:
    """The misses of one prompt, as they are found block by block.

    Args:
        size: tokens of a block.

    Attributes:
        found: the misses, in prompt order, each of as many tokens as it goes on for.
    """

    def __init__(self, size: int) -> None:
        self.found: list[CacheMiss] = []
        self._size = size
        # Blocks behind which the prompt could have been resumed, had a window been kept there.
        self._waiting = 0

    def add(self, miss: CacheMiss) -> None:
        """Note that a block is missed for the reason of ``miss``."""
        self._end_waiting()
        self._add(miss, 1)

    def add_window(self, miss: CacheMiss) -> None:
        """Note that the next block, and all that wait, are missed for the reason of ``miss``."""
        waiting, self._waiting = self._waiting, 0
        self._add(miss, waiting + 1)

    def wait(self) -> None:
        """Note that the next block is there, and was not read."""
        self._waiting += 1

    def listed(self) -> tuple[CacheMiss, ...]:
        """Return all misses."""
        self._end_waiting()
        return tuple(self.found)

    def _end_waiting(self) -> None:
        if self._waiting:
            self._add(CacheMiss(MissCause.NO_CHECKPOINT, 0), self._waiting)
            self._waiting = 0

    def _add(self, miss: CacheMiss, blocks: int) -> None:
        last = self.found[-1] if self.found else None
        if last is not None and (miss.continues(last) or len(self.found) == MAX_MISSES):
            self.found[-1] = replace(last, tokens=last.tokens + blocks * self._size)
        else:
            self.found.append(replace(miss, tokens=blocks * self._size))


def _absence_miss(remote: RemoteTierManager, absence: Absence, tokens: int) -> CacheMiss:
    return CacheMiss(absence.cause, tokens, remote.name, detail=absence.detail)
