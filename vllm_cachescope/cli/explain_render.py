"""What ``cachescope explain`` prints for people: a summary, each break if asked, and totals."""

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_cachescope.cli.explanation import Explained, Explanation
from vllm_cachescope.cli.findings.group import Group
from vllm_cachescope.cli.findings.loss import Loss
from vllm_cachescope.cli.findings.quotes import Quote
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker

_SHOWN_CHANGES = 10
_SHOWN_GROUPS = 20
_SHOWN_IGNORED = 20


def render(
    explanation: Explanation, groups: list[Group], console: Console, each: bool = False
) -> None:
    """Print what was found, the most tokens first, and a table of uncached tokens by cause.

    Args:
        explanation: the calls.
        groups: their losses by rule and place.
        console: where to print it.
        each: whether to list each break as well, lineage by lineage.
    """
    if not explanation.breaks:
        console.print("No prefix broke.")
    for group in groups[:_SHOWN_GROUPS]:
        _render_group(group, explanation, console)
    if (more := len(groups) - _SHOWN_GROUPS) > 0:
        console.print(f"and {more:,} more rules and places, which cost less (--all)")
    if each:
        _render_each(explanation, console)
    elif explanation.breaks:
        console.print("Each by itself: --all. A picture of each session: --heat-map.")
    _render_ignored(explanation, console)
    _render_totals(explanation, console)


def _render_group(group: Group, explanation: Explanation, console: Console) -> None:
    loss = group.loss
    line = Text()
    line.append(f"{loss.rule.code} {loss.rule.name}", style=_style(loss))
    line.append(f" at {loss.path}" if group.calls == 1 and loss.path else "")
    line.append(f" at {loss.place}" if group.calls > 1 and loss.place else "")
    calls = "1 call" if group.calls == 1 else f"{group.calls:,} calls"
    line.append(f": {calls}, {group.tokens:,} tokens")
    if explanation.prompt_tokens:
        line.append(f", {group.tokens / explanation.prompt_tokens:.1%} of all")
    console.print(line, highlight=False, soft_wrap=True)
    places = group.first if group.calls == 1 else f"{group.first} to {group.last}"
    _detail(f"{places}: {loss.words}", console)
    _render_quote(loss.quote, console)
    if loss.suggestion:
        _detail(f"→ {loss.suggestion}", console)


def _style(loss: Loss) -> str:
    return "bold red" if loss.is_break else "yellow"


def _render_quote(told: Quote | None, console: Console) -> None:
    if told is not None:
        _detail(f"character {told.char:,} of {told.path}:", console)
        _detail(f"- {told.before!r}", console, "red")
        _detail(f"+ {told.after!r}", console, "green")


def _detail(text: str, console: Console, style: str = "") -> None:
    line = Text(f"      {text}", style=style)
    console.print(line, highlight=False, soft_wrap=True)


def _render_each(explanation: Explanation, console: Console) -> None:
    several = len({call.file for call in explanation.calls}) > 1
    by_lineage: dict[str, list[Explained]] = {}
    for call in explanation.breaks:
        names = [call.file] if several else []
        names += [f"session {call.session}"] if call.session else []
        names += [f"lineage {call.diagnosis.lineage}"]
        by_lineage.setdefault(", ".join(names), []).append(call)
    if alike := explanation.could_share:
        by_lineage["new lineages that could have shared more"] = alike
    for name, calls in by_lineage.items():
        console.print(name, style="bold", markup=False, highlight=False, soft_wrap=True)
        for call in calls:
            for loss in call.losses:
                _render_loss(call, loss, console)


def _render_loss(call: Explained, loss: Loss, console: Console) -> None:
    where = call.diagnosis.where
    place = f" at {loss.path}" if loss.path else ""
    place += f", token {where.token:,}" if where and loss.path else ""
    line = Text(f"  {call.source}  ")
    line.append(f"{loss.rule.code} {loss.rule.name}", style=_style(loss))
    line.append(f"{place}; {loss.tokens:,} tokens: {loss.words}")
    console.print(line, highlight=False, soft_wrap=True)
    if loss.path:
        changes = call.diagnosis.changes[:_SHOWN_CHANGES]
        for change in changes:
            _detail(str(change), console)
        if more := len(call.diagnosis.changes) - len(changes):
            _detail(f"and {more} more changes", console)
    _render_quote(loss.quote, console)
    if loss.suggestion:
        _detail(f"→ {loss.suggestion}", console)


def _render_ignored(explanation: Explanation, console: Console) -> None:
    """Print each place of a marker that a server ignores, once."""
    first: dict[IgnoredMarker, str] = {}
    times: Counter[IgnoredMarker] = Counter()
    for call in explanation.calls:
        for marker in call.ignored:
            first.setdefault(marker, call.source)
            times[marker] += 1
    if not first:
        return
    console.print("Ignored markers", style="bold")
    for marker, source in list(first.items())[:_SHOWN_IGNORED]:
        line = Text(f"  {source}  ")
        line.append(marker.reason.value, style="yellow")
        line.append(f" at {marker.path}: {marker.reason.words}")
        if times[marker] > 1:
            line.append(f" ({times[marker]} times)")
        console.print(line, highlight=False, soft_wrap=True)
    if (more := len(first) - _SHOWN_IGNORED) > 0:
        console.print(f"      and at {more} more places")


def _render_totals(explanation: Explanation, console: Console) -> None:
    table = Table(title="Uncached tokens by cause", title_justify="left")
    table.add_column("cause")
    table.add_column("calls", justify="right")
    table.add_column("tokens", justify="right")
    for cause, total in explanation.totals().items():
        table.add_row(cause, f"{total.calls:,}", f"{total.tokens:,}")
    console.print(table)
    for scope, shared in explanation.shared.items():
        console.print(f"{shared:,} tokens of scope {scope.label} were left by other conversations.")
    tokens, reusable = explanation.prompt_tokens, explanation.reusable_tokens
    fraction = f"{reusable / tokens:.1%}" if tokens else "none"
    console.print(
        f"{len(explanation.calls):,} calls, {tokens:,} prompt tokens, {fraction} reusable; "
        f"{len(explanation.breaks)} breaks, {len(explanation.unexpected)} of them unexpected; "
        f"{len(explanation.could_share)} new lineages could have shared more.",
        soft_wrap=True,
    )
