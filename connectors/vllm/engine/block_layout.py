"""The layout of blocks: how the engine cuts prompts into blocks and chunks, and their keys."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    SchedulerOffloadConfig,
)
from vllm.v1.request import Request

from vllm_cachescope.prompt.plan import Plan

_SUFFIX_BYTES = 4


class Group(NamedTuple):
    """A KV cache group: layers whose blocks are cut alike.

    Attributes:
        id: the group's number, which ends the keys of its blocks.
        tokens_per_block: tokens per block of the group; a multiple of the layout's
            ``tokens_per_hash``.
        window: how many blocks in front of a position a prompt needs in order to go on from there:
            those of its sliding window, or one with the state of linear attention. None for all
            of them, as full attention needs.
        keeps_all: whether the engine caches every block that it fills, and not only those that
            `window` asks for at a prompt's end and at the checkpoints in it.
    """

    id: int
    tokens_per_block: int
    window: int | None = None
    keeps_all: bool = True

    @property
    def suffix(self) -> bytes:
        """The end of the keys of the group's blocks, behind the block's hash."""
        return self.id.to_bytes(_SUFFIX_BYTES, "big")

    def kept(self, blocks: int) -> int:
        """Return how many of a prompt's ``blocks`` the engine keeps, about."""
        return blocks if self.keeps_all or self.window is None else min(blocks, self.window)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How the engine cuts prompts into blocks.

    Attributes:
        tokens_per_hash: tokens per block hash.
        groups: the KV cache groups; at least one. The first one may be of any kind.
        blocks_per_chunk: blocks that tiers behind the device keep as one.
    """

    tokens_per_hash: int
    groups: tuple[Group, ...]
    blocks_per_chunk: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens between the positions at which a prompt can be resumed: all groups have a block
        that ends there."""
        return math.lcm(*(group.tokens_per_block for group in self.groups))

    @property
    def is_plain(self) -> bool:
        """Whether a prompt's blocks are of one group, and each needs all before it."""
        return len(self.groups) == 1 and self.groups[0].window is None

    @property
    def has_checkpoints(self) -> bool:
        """Whether a prompt can be resumed at some of these positions only, since a group keeps no
        more than its window there."""
        return any(group.window is not None and not group.keeps_all for group in self.groups)

    def split(self, keys: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return those of ``keys`` that every longer prompt needs, and those that belong to a
        window."""
        windowed = {group.suffix for group in self.groups if group.window is not None}
        whole: list[bytes] = []
        windows: list[bytes] = []
        for key in keys:
            (windows if key[-_SUFFIX_BYTES:] in windowed else whole).append(key)
        return whole, windows

    def tokens_of(self, keys: Iterable[bytes]) -> int:
        """Return the tokens that keys of a tier behind the device stand for. Several groups have a
        key each for the same tokens: the one with the most tokens counts."""
        keys_of = Counter(key[-_SUFFIX_BYTES:] for key in keys)
        return max(
            keys_of[group.suffix] * group.tokens_per_block * self.blocks_per_chunk
            for group in self.groups
        )

    def blocks(
        self, request: Request, group: Group, start: int, end: int
    ) -> list[tuple[int, bytes]]:
        """Return ``(end, key)`` of the blocks of a group between two positions, in order.

        Args:
            request: the request whose blocks are wanted.
            group: one of the groups.
            start: a position inside the first block, in tokens.
            end: a position behind the last block, in tokens.
        """
        stride = group.tokens_per_block // self.tokens_per_hash
        first = start // group.tokens_per_block
        hashes = islice(
            request.block_hashes,
            (first + 1) * stride - 1,
            end // self.tokens_per_hash,
            stride,
        )
        ends = count((first + 1) * group.tokens_per_block, group.tokens_per_block)
        suffix = group.suffix
        return [(end, block_hash + suffix) for end, block_hash in zip(ends, hashes, strict=False)]

    def blocks_of_all(
        self, request: Request, start: int, end: int
    ) -> list[tuple[int, bytes, Group]]:
        """Return ``(end, key, group)`` of the blocks of all groups between two positions, in the
        order of their ends; see `blocks`."""
        found = [
            (block_end, key, group)
            for group in self.groups
            for block_end, key in self.blocks(request, group, start, end)
        ]
        if len(self.groups) > 1:
            found.sort(key=lambda block: block[0])
        return found

    def chunks(self, request: Request, tokens: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield ``(start, end, key)`` of each whole chunk in the first ``tokens`` tokens, group by
        group."""
        for group in self.groups:
            chunk = group.tokens_per_block * self.blocks_per_chunk
            stride = chunk // self.tokens_per_hash
            suffix = group.suffix
            hashes = islice(request.block_hashes, stride - 1, tokens // chunk * stride, stride)
            for end, block_hash in zip(count(chunk, chunk), hashes, strict=False):
                yield end - chunk, end, block_hash + suffix

    def chunks_between(self, request: Request, start: int, end: int) -> int:
        """Return how many whole chunks of the first ``end`` tokens end behind ``start``."""
        return sum(chunk_end > start for _, chunk_end, _ in self.chunks(request, end))

    def keys_at(self, request: Request, end: int) -> list[bytes]:
        """Return the keys of the blocks that end at ``end`` (tokens), one of each group that has
        such a block."""
        block_hash = request.block_hashes[end // self.tokens_per_hash - 1]
        return [
            block_hash + group.suffix for group in self.groups if end % group.tokens_per_block == 0
        ]

    def chunks_at(self, request: Request, end: int) -> list[tuple[int, bytes]]:
        """Return ``(end, key)`` of each group's chunk that holds the block which ends at ``end``
        (tokens), without those that the prompt ends inside of: no tier keeps these."""
        found = []
        for group in self.groups:
            chunk = group.tokens_per_block * self.blocks_per_chunk
            chunk_end = -(-end // chunk) * chunk
            if chunk_end <= request.num_prompt_tokens:
                block_hash = request.block_hashes[chunk_end // self.tokens_per_hash - 1]
                found.append((chunk_end, block_hash + group.suffix))
        return found

    def whole_blocks(self, tokens: int) -> int:
        """Return how many blocks of all groups end within the first ``tokens`` tokens: so many
        come first in `blocks_of_all`."""
        return sum(tokens // group.tokens_per_block for group in self.groups)

    def newcomers(self, plan: Plan, tokens: int) -> Counter[bytes]:
        """Return how many blocks a prompt will add of which its first ``tokens`` tokens are cached,
        by owner."""
        added: Counter[bytes] = Counter()
        for group in self.groups:
            size = group.tokens_per_block
            for start, end, span in plan.ranges(size):
                blocks = max(0, end // size - max(start, tokens) // size)
                added[plan.owner_in(span)] += group.kept(blocks)
        return added

    def quota_chunks(self, plan: Plan, end: int) -> int:
        """Return how many chunks of a prompt count towards the quota of the chunk that ends at
        ``end`` (tokens), up to that chunk and with it."""
        start = plan.quota_start(end)
        chunks = 0
        for group in self.groups:
            size = group.tokens_per_block * self.blocks_per_chunk
            chunks += group.kept(end // size - start // size)
        return chunks

    def checkpoint(self, plan: Plan, tokens: int) -> int:
        """Return the first position behind ``tokens`` tokens of a prompt at which its plan has a
        span end, and thus other prompts may go on; 0 if there is none, or if all positions are
        alike. The end of the prompt is none: vLLM keeps what is needed there by itself."""
        if not self.has_checkpoints:
            return 0
        step = self.tokens_per_step
        last = (plan.spans[-1].end - 1) // step * step
        ends = (span.end // step * step for span in plan.spans[:-1])
        return next((end for end in ends if tokens < end < last), 0)


def read_layout(offload: SchedulerOffloadConfig) -> BlockLayout:
    """Return the layout of the blocks that vLLM's offloading keeps."""
    # Without an interval windows are kept everywhere, but a linear attention's state is only there
    # where a step ends.
    sparse = offload.retention_interval is not None
    groups = []
    for group in offload.kv_group_configs:
        window = group.sliding_window_size_in_chunks
        if window is None:
            groups.append(Group(group.group_idx, group.tokens_per_block))
            continue
        keeps_all = not (sparse or group.requires_cow_source)
        blocks = window * offload.blocks_per_chunk
        groups.append(Group(group.group_idx, group.tokens_per_block, blocks, keeps_all))
    return BlockLayout(offload.tokens_per_hash, tuple(groups), offload.blocks_per_chunk)
