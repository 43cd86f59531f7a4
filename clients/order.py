"""An order to the served model: which tool to call. `obedience` has it followed."""

MARK = "§"
DONE = "It says so."
"""What the model answers once it has called the tool."""


def order(tool: str, **arguments: str) -> str:
    """Return a prompt that orders a call of ``tool``.

    A value in square brackets is a list of that one string.
    """
    pairs = (f"{name}={value}" for name, value in arguments.items())
    return f"{MARK}{tool} {'; '.join(pairs)}{MARK}"
