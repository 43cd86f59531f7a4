"""The parameters of a request: which of them change the prompt, and from which token on."""

ROUTING_PARAMS = frozenset({"prompt_cache_key", "service_tier", "speed"})
"""Parameters that say where or how fast to compute an answer, and never reach the prompt."""

# Parameters that a chat template renders at the start of the prompt, that replace the template, or
# that change the hash of every block. All others are taken to change the prompt from its messages
# on: so Anthropic documents it for thinking and tool_choice.
_FRONT_PARAMS = (
    "add_special_tokens",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "reasoning",
    "reasoning_effort",
    "truncate_prompt_tokens",
    "truncation_side",
    "truncation",
)


def is_front(name: str) -> bool:
    """Whether the parameter ``name`` changes the prompt from its first token on."""
    return name.partition(".")[0] in _FRONT_PARAMS
