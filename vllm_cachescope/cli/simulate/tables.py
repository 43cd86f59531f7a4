"""Tables of a simulation for a terminal."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from vllm_cachescope.durations import format_duration
from vllm_cachescope.simulation.replay import Hits, Outcome
from vllm_cachescope.simulation.traced_request import TracedRequest

Outcomes = Mapping[tuple[str, int], Outcome]
"""What came of each replay, by policy and capacity in blocks."""


def render(
    console: Console, requests: Sequence[TracedRequest], block_tokens: int, outcomes: Outcomes
) -> None:
    """Print the tables of a simulation."""
    blocks = sum(len(request.keys) for request in requests)
    distinct = len({key for request in requests for key in request.keys})
    console.print(
        f"{len(requests):,} requests, {blocks:,} blocks of {block_tokens} tokens, {distinct:,} of "
        f"them distinct; a cache without end reads {1 - distinct / max(1, blocks):.4f}",
        highlight=False,
        soft_wrap=True,
    )
    _ratios(console, "Share of blocks read, by capacity in blocks", outcomes, _total)
    ttls = {ttl for outcome in outcomes.values() for ttl in outcome.by_ttl}
    for ttl_s in sorted(ttls, key=lambda ttl: ttl or 0) if len(ttls) > 1 else ():
        name = "no TTL" if ttl_s is None else format_duration(ttl_s)
        title = f"Share of blocks read, of requests with {name}"
        _ratios(console, title, outcomes, lambda outcome, ttl=ttl_s: outcome.by_ttl.get(ttl))  # type: ignore[misc]
    table = Table(title="Work", title_justify="left")
    for column in ("policy", "capacity", "tokens read", "evictions", "blocks a second"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for (policy, capacity), outcome in outcomes.items():
        table.add_row(
            policy,
            f"{capacity:,}",
            f"{outcome.total.token_ratio:.4f}",
            f"{outcome.evictions:,}",
            f"{outcome.blocks_per_second:,.0f}",
        )
    console.print(table)


def _total(outcome: Outcome) -> Hits:
    return outcome.total


def _ratios(
    console: Console,
    title: str,
    outcomes: Outcomes,
    choose: Callable[[Outcome], Hits | None],
) -> None:
    capacities = list(dict.fromkeys(capacity for _, capacity in outcomes))
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for capacity in capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for policy in dict.fromkeys(policy for policy, _ in outcomes):
        cells = []
        for capacity in capacities:
            hits = choose(outcomes[policy, capacity])
            best = outcomes.get(("belady", capacity))
            optimum = choose(best) if best is not None else None
            cell = "–" if hits is None else f"{hits.ratio:.4f}"
            if hits is not None and optimum is not None and optimum.ratio and policy != "belady":
                cell += f" ({hits.ratio / optimum.ratio:.2f})"
            cells.append(cell)
        table.add_row(policy, *cells)
    console.print(table)
