"""Two tenants with equal prompts behind one router: what one reads of the other's."""

from dataclasses import replace

from benchmarks.agent_load import Call
from benchmarks.fleet.drive import Asking
from benchmarks.fleet.load import Prompt

_PROMPTS = 3
_TIMES = 4
"""How often the first tenant asks for each, so that as good as surely every replica has it."""


def read_across(ask: Asking, label: str) -> tuple[int, int]:
    """Have one tenant ask for some prompts, and then another one for the same.

    Returns:
        How many tokens the first one read of its own, and the second one of the first one's.
    """
    own = across = 0
    for number in range(_PROMPTS):
        text = f"Secret {number} of {label}. " + " ".join(
            f"{label} {number}.{n}" for n in range(150)
        )
        prompt = Prompt(
            Call("tenant one", f"session {number}", {}, 0.0),
            f"{label}-one-{number}",
            {"messages": [{"role": "user", "content": text}]},
            (),
        )
        own += sum(ask(prompt, time).read for time in range(_TIMES))
        other = replace(prompt, call=replace(prompt.call, tenant="tenant two"))
        across += ask(replace(other, session=f"{label}-two-{number}"), _TIMES).read
    return own, across
