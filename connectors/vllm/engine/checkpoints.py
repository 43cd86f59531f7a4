"""The checkpoints of a prompt: where a model with windows or states can resume."""

from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.prompts import Prompt


def move_checkpoint(prompt: Prompt | None, layout: BlockLayout) -> None:
    """Have vLLM keep windows at a prompt's next checkpoint, once the prompt has reached one: vLLM
    knows of one at a time."""
    if prompt is None or prompt.request is None:
        return
    if prompt.registered >= prompt.request.shared_prefix_boundary:
        following = layout.checkpoint(prompt.plan, prompt.registered)
        if following:
            prompt.request.shared_prefix_boundary = following
