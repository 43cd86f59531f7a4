"""Prints what a command has found, in colours on a terminal."""

from collections.abc import Callable

from rich.console import Console


def show(render: Callable[[Console], None]) -> None:
    """Print what ``render`` writes to the console that it is called with.

    Raises:
        BrokenPipeError: if nobody reads on. Rich itself would end the program there with status 1,
            which of ``explain`` and ``lint`` means that they found something.
    """
    console = Console()
    with console.capture() as rendered:
        render(console)
    print(rendered.get(), end="")


def printable(text: str) -> str:
    """Return a text that a client chose without what would move a terminal's cursor, or colour it:
    each such character is a question mark."""
    return "".join(one if one.isprintable() else "?" for one in text)
