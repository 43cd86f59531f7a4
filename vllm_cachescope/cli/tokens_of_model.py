"""What a model's engine counts by: its tokenizer, and how many tokens its blocks have."""

import argparse
from collections.abc import Callable
from typing import Any

from vllm_cachescope.diagnosis.token_estimate import estimate_tokens

Count = Callable[[Any, bytes], int]
"""Counts the tokens of a part, from its content and its canonical bytes."""


class ModelError(ValueError):
    """A model of which vLLM does not tell how long its blocks are."""


def add_arguments(parser: "argparse._ActionsContainer") -> None:
    """Add ``--tokenizer`` and ``--model``, which `read` reads."""
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="count by the engine's tokenizer: a tokenizer.json, a folder with one, or a name on "
        "the Hugging Face hub",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="count by this model's tokenizer and in its blocks, which vLLM has to be installed "
        "for; those of hybrid models are long",
    )


def read(args: argparse.Namespace, block: int | None) -> tuple[Count, int | None]:
    """Return what to count tokens by, and how many tokens a block has; None if no block counts.

    Args:
        args: the parsed arguments.
        block: tokens in a block, if the command line tells.

    Raises:
        TokenizerError: if the tokenizer cannot be found or read.
        ModelError: if the length of the model's blocks is not known.
    """
    name = args.tokenizer or args.model
    count: Count = estimate_tokens
    if name is not None:
        # It is slow to import.
        from vllm_cachescope.cli.token_counter import load_counter

        count = load_counter(name)
    if block is None and args.model is not None:
        from vllm_cachescope.connectors.vllm import preflight

        block = preflight.block_tokens(args.model)
        if block is None:
            raise ModelError(f"{args.model}: vLLM does not tell how long its blocks are; give "
                             "--block-size")  # fmt: skip
    return count, block
