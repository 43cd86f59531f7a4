"""What makes the served model do as its prompt says, so that real clients get real tool calls.

A prompt holds an order between two `MARK`: a tool and its arguments. The answer is that call, and
once a tool's result has come after the order, `DONE`. A prompt without an order is answered with
`DONE` too. The tokens go through vLLM's own tool parser and protocol, as any model's do.
"""

import json
import re
from collections.abc import Callable

import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from clients.order import DONE, MARK

# Without quotes, since some clients quote the prompt once more.
_ORDER = re.compile(f"{MARK}(?P<tool>[^ {MARK}]+) (?P<arguments>[^{MARK}]+){MARK}")
# As the template of the demo's model renders them.
_RESULT = "<tool_response>"
_TOOLS = "<tools>"


def answer_to(prompt: str) -> str:
    """Return the answer to a rendered prompt."""
    orders = list(_ORDER.finditer(prompt))
    if not orders or _TOOLS not in prompt or _RESULT in prompt[orders[-1].end() :]:
        return DONE
    pairs = (pair.split("=", 1) for pair in orders[-1]["arguments"].split("; "))
    arguments = {name: _value(text) for name, text in pairs}
    call = {"name": orders[-1]["tool"], "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def _value(text: str) -> str | list[str]:
    return [text[1:-1]] if text.startswith("[") else text


class Obedience(AdapterLogitsProcessor):
    """Leaves one token to choose from: the next one of the answer to the prompt."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)

    def is_argmax_invariant(self) -> bool:
        """It decides on every token."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], list[int], torch.Tensor], torch.Tensor]:
        """Return the processor of one request: of its prompt, its output so far and its logits."""
        answer: list[int] = []

        def choose(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if not answer:
                text = answer_to(self._tokenizer.decode(prompt))
                answer.extend(self._tokenizer.encode(text, add_special_tokens=False))
                answer.append(self._tokenizer.eos_token_id)
            chosen = torch.full_like(logits, float("-inf"))
            chosen[answer[min(len(output), len(answer) - 1)]] = 0.0
            return chosen

        return choose
