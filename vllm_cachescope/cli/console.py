"""Prints what a command has found."""

from collections.abc import Callable

from rich.console import Console


def show(render: Callable[[Console], None]) -> None:
    """Print what ``render`` writes to the console it is given.

    Raises:
        BrokenPipeError: if nobody reads on. Rich itself would end the program there, and with 1,
            which to a command means that it found something.
    """
    console = Console()
    with console.capture() as rendered:
        render(console)
    print(rendered.get(), end="")
