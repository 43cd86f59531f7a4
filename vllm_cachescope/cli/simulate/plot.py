"""A plot of a simulation: the share of blocks read over capacities, a line a policy."""

from importlib.util import find_spec

from vllm_cachescope.cli.simulate.tables import Outcomes


class NoPlotError(Exception):
    """What draws plots is not installed."""


def check() -> None:
    """Look whether plots can be drawn.

    Raises:
        NoPlotError: if they cannot.
    """
    if find_spec("matplotlib") is None:
        raise NoPlotError("--plot needs Matplotlib: pip install 'vllm-cachescope[plot]'")


def draw(outcomes: Outcomes, path: str) -> None:
    """Write the plot to a file, whose ending names the format.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for policy in dict.fromkeys(policy for policy, _ in outcomes):
        points = sorted(
            (capacity, outcome.total.ratio)
            for (name, capacity), outcome in outcomes.items()
            if name == policy
        )
        axes.plot(
            [capacity for capacity, _ in points],
            [ratio for _, ratio in points],
            marker="o",
            label=policy,
            linewidth=2.5 if policy == "learned" else 1.2,
            linestyle="--" if policy == "belady" else "-",
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity in blocks")
    axes.set_ylabel("share of blocks read")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
