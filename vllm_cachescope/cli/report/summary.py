"""The summary of a recording, as plain data: what the console, JSON and the page show."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vllm_cachescope.cli.report.best_marking import Spent
from vllm_cachescope.cli.report.recording import LONG, RECORDED, SHORT, Agent, Recording
from vllm_cachescope.cli.report.sessions import Session
from vllm_cachescope.usage.prices import Multipliers, Prices, saved_share

WITHOUT, AS_RECORDED, FIVE_MINUTES, ONE_HOUR = "without", "recorded", "5m", "1h"
UNIFORM, BEST = "uniform", "best"

_MOST_SESSIONS = 1000  # that are told one by one
_MOST_LINEAGES = 100  # of each of them
_MOST = 200  # groups of breaks, tools and files


def summarise(recording: Recording, prices: Prices, tokenizer: str) -> dict[str, Any]:
    """Return the summary of a recording.

    Costs are in the prices' currency, null where the price of a model is not known; ``equivalents``
    are what was spent in tokens that are neither read nor written.

    Args:
        recording: the recording, to which nothing is added any more.
        prices: of the models.
        tokenizer: what the tokens were counted by.
    """
    sessions = sorted(recording.sessions.values(), key=lambda session: -session.tokens)
    priced = {agent.model for agent in recording.agents if prices.of(agent.model) is not None}
    return {
        "calls": recording.calls,
        "tokens": recording.tokens,
        "shared_tokens": recording.shared,
        "tokenizer": tokenizer,
        "untimed_calls": recording.untimed,
        "marked_calls": recording.marked,
        "measured": _measured(recording),
        "currency": prices.currency,
        "unpriced_models": sorted({agent.model for agent in recording.agents} - priced),
        "costs": _costs(recording, prices),
        "markings": _markings(recording),
        "breaks": {
            "calls": recording.breaks.calls,
            "missed_tokens": recording.breaks.missed,
            "groups": [
                {
                    "code": group.loss.rule.code,
                    "rule": group.loss.rule.name,
                    "level": group.loss.rule.level.name.lower(),
                    "place": group.loss.place,
                    "calls": group.calls,
                    "missed_tokens": group.missed,
                    "first": group.source,
                    "message": group.loss.words,
                    "suggestion": group.loss.suggestion,
                }
                for group in recording.breaks.groups()[:_MOST]
            ],
        },
        "elsewhere": _elsewhere(recording),
        "session_count": len(sessions),
        "sessions": [_session(session) for session in sessions[:_MOST_SESSIONS]],
    }


def agent_name(agent: Mapping[str, Any]) -> str:
    """Return which agent it is in words, as in ``agent 1 (small-model, 24 tools)``."""
    told = [agent["model"]] if agent["model"] else []
    told += [f"{agent['tools']} tools"] if agent["tools"] else []
    return f"agent {agent['agent'] + 1}" + (f" ({', '.join(told)})" if told else "")


def ratio(read: int, fresh: int) -> float | None:
    """Return the tokens read for each one that was not; None if there was none."""
    return read / fresh if fresh else None


def _measured(recording: Recording) -> dict[str, Any] | None:
    tokens, read = recording.measured
    return {"tokens": tokens, "read": read} if tokens else None


def _costs(recording: Recording, prices: Prices) -> dict[str, Any]:
    best, agents = recording.best, recording.agents
    ways: dict[str, Callable[[Agent], Spent]] = {
        WITHOUT: lambda agent: Spent(0, 0, 0, agent.spent(RECORDED).tokens)
    }
    if recording.marked:
        ways[AS_RECORDED] = lambda agent: agent.spent(RECORDED)
    ways[FIVE_MINUTES] = lambda agent: agent.spent(SHORT)
    ways[ONE_HOUR] = lambda agent: agent.spent(LONG)
    ways[UNIFORM] = lambda agent: best.uniform_spent[agent.number]
    ways[BEST] = lambda agent: best.spent[agent.number]
    costs: dict[str, Any] = {}
    for name, spent_of in ways.items():
        spent = [(agent, spent_of(agent)) for agent in agents]
        costs[name] = _cost(spent, prices)
    without = costs[WITHOUT]
    for cost in costs.values():
        cost["saved"] = saved_share(without["equivalents"], cost["equivalents"])
        if cost["cost"] is not None:
            cost["saved"] = saved_share(without["cost"], cost["cost"])
    return costs


def _cost(spent: list[tuple[Agent, Spent]], prices: Prices) -> dict[str, Any]:
    total, cost = 0.0, 0.0
    known = True
    for agent, one in spent:
        price = prices.of(agent.model)
        multipliers = price.multipliers if price else Multipliers()
        total += one.equivalents(multipliers)
        if price is None:
            known = False
        else:
            cost += price.cost_with(one.uncached, one.read, one.created_by_ttl)
    read = sum(one.read for _, one in spent)
    fresh = sum(one.tokens - one.read for _, one in spent)
    return {
        "read": read,
        "written_5m": sum(one.short for _, one in spent),
        "written_1h": sum(one.long for _, one in spent),
        "uncached": sum(one.uncached for _, one in spent),
        "read_per_fresh": ratio(read, fresh),
        "equivalents": total,
        "cost": cost if known and spent else None,
    }


def _markings(recording: Recording) -> dict[str, Any]:
    best = recording.best
    return {
        "uniform": str(best.uniform),
        "agents": [
            {
                "agent": agent.number,
                "model": agent.model,
                "tools": agent.tools,
                "calls": agent.calls,
                "tokens": best.spent[agent.number].tokens,
                "read": best.spent[agent.number].read,
                "breakpoints": str(best.markings[agent.number]),
            }
            for agent in recording.agents
        ],
    }


def _elsewhere(recording: Recording) -> dict[str, Any]:
    by_tool: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    by_scope: Counter[str] = Counter()
    for (origin, scope), tokens in recording.repeats.tokens.items():
        by_tool[_content(origin.kind, origin.tool)] += tokens
        by_scope[str(scope)] += tokens
        if origin.file:
            by_file[origin.file] += tokens
    other = recording.repeats.other
    return {
        "tokens": sum(by_tool.values()) + other,
        "unnamed_tokens": other,
        "by_tool": dict(by_tool.most_common(_MOST)),
        "by_file": dict(by_file.most_common(_MOST)),
        "by_scope": dict(by_scope.most_common()),
    }


def _content(kind: str, tool: str | None) -> str:
    if tool is None:
        return f"{kind} text" if kind in ("user", "assistant") else kind
    return f"definition of {tool}" if kind == "tool" else f"{kind} of {tool}"


def _session(session: Session) -> dict[str, Any]:
    lineages = sorted(session.lineages(), key=lambda one: -one.tokens)
    return {
        "session": session.name,
        "calls": len(session),
        "tokens": session.tokens,
        "phases": [
            {
                "first_call": phase.first + 1,
                "last_call": phase.last + 1,
                "tokens": phase.tokens,
                "shared_tokens": phase.shared,
                "share": phase.share,
                "agents": list(phase.agents),
                "began": phase.began,
            }
            for phase in session.phases()
        ],
        "lineage_count": len(lineages),
        "lineages": [
            {
                "lineage": one.number,
                "agent": one.agent,
                "calls": one.calls,
                "tokens": one.tokens,
                "shared_tokens": one.shared,
                "breaks": one.breaks,
                "missed_tokens": one.missed,
            }
            for one in lineages[:_MOST_LINEAGES]
        ],
    }
