"""How large a fleet's replicas are, and the load on them."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import BLOCK
from demo.model import MODELS, SMALL, TINY, ModelSize, build


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a replica.

    Attributes:
        shape: the model's.
        longest: tokens that a prompt and its answer may have.
        device_blocks: blocks on the device.
        cpu_blocks: blocks in the CPU tier, where there is one.
    """

    shape: ModelSize
    longest: int
    device_blocks: int
    cpu_blocks: int

    @property
    def model(self) -> Path:
        """The model's directory, which is made where it is missing."""
        return build(MODELS / self.shape.name, self.shape)

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block, in float32."""
        return BLOCK * 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * 4

    def times(self, count: int) -> "Size":
        """Return the size of one replica with the memory of so many."""
        blocks = {
            "device_blocks": count * self.device_blocks,
            "cpu_blocks": count * self.cpu_blocks,
        }
        return replace(self, **blocks)


SIZES = {
    shape.name: Size(shape, longest=10_240, device_blocks=200, cpu_blocks=400)
    for shape in (TINY, SMALL)
}
"""By the model's name: the small one takes some ten times as long to compute a prompt."""
