"""The layout of blocks: how the engine cuts prompts into blocks and chunks, and their keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

from vllm.v1.request import Request

from vllm_cachescope.prompt.plan import Plan


class Group(NamedTuple):
    """A KV cache group: layers whose blocks are cut alike.

    Attributes:
        id: the group's number, which ends the keys of its blocks.
        tokens_per_block: tokens per block of the group; a multiple of the layout's
            ``tokens_per_hash``.
    """

    id: int
    tokens_per_block: int

    @property
    def suffix(self) -> bytes:
        """The end of the keys of the group's blocks, behind the block's hash."""
        return self.id.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How the engine cuts prompts into blocks.

    Attributes:
        tokens_per_hash: tokens per block hash.
        groups: the KV cache groups; at least one.
        blocks_per_chunk: blocks that tiers behind the device keep as one.
    """

    tokens_per_hash: int
    groups: tuple[Group, ...]
    blocks_per_chunk: int

    @property
    def tokens_per_key(self) -> float:
        """Tokens that the engine computes for one key of a tier behind the device. With several
        groups the same tokens have a key in each."""
        shortest = min(group.tokens_per_block for group in self.groups)
        return shortest * self.blocks_per_chunk / len(self.groups)

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

    def keys_at(self, request: Request, end: int) -> list[bytes]:
        """Return the keys of the blocks that end at ``end`` (tokens), one of each group that has
        such a block."""
        block_hash = request.block_hashes[end // self.tokens_per_hash - 1]
        return [
            block_hash + group.suffix for group in self.groups if end % group.tokens_per_block == 0
        ]

    def chunk_of(self, request: Request, block_end: int) -> tuple[int, bytes] | None:
        """Return ``(end, key)`` of the first group's chunk that holds a block; None if the prompt
        ends inside that chunk, so that no tier keeps it.

        Args:
            request: the request whose chunk is wanted.
            block_end: position just past the block's last token.
        """
        group = self.groups[0]
        chunk = group.tokens_per_block * self.blocks_per_chunk
        end = -(-block_end // chunk) * chunk
        if end > request.num_prompt_tokens:
            return None
        return end, request.block_hashes[end // self.tokens_per_hash - 1] + group.suffix

    def quota_chunks(self, plan: Plan, end: int) -> int:
        """Return how many chunks of a prompt count towards the quota of the chunk that ends at
        ``end`` (tokens), up to that chunk and with it."""
        start = plan.quota_start(end)
        sizes = [group.tokens_per_block * self.blocks_per_chunk for group in self.groups]
        return sum(end // size - start // size for size in sizes)
