"""What it costs to find the boundaries of long histories, next to rendering and tokenising them;
and what to tokenise them where the turn before is known.

Runs vLLM's own front end in this process, without an engine.
"""

import asyncio
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.render.app_state import init_render_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.harness import Result, arguments, finish
from demo.model import SMALL, build
from demo.session import agent_session, marked, to_chat
from vllm_cachescope.connectors.vllm.api_server.boundaries import Boundaries
from vllm_cachescope.connectors.vllm.api_server.tokenizing import FIRST_CHECKS
from vllm_cachescope.prompt.request import Protocol, Region
from vllm_cachescope.prompt.segments import RegionDefault, segments
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS, strip

TOKEN_BYTES = 64 * 2**20
"""Of known tokens, in bytes."""

# Turns of an agent session whose prompts have about this many tokens.
HISTORIES = {"8k": 11, "50k": 150, "150k": 485}

_DEFAULTS = {
    Region.TOOLS: RegionDefault(Scope.ORG, 300),
    Region.SYSTEM: RegionDefault(Scope.ORG, 300),
    Region.MESSAGES: RegionDefault(Scope.SESSION, 300),
}


def body_of(turns: int) -> dict[str, Any]:
    """Return a Chat Completions body with breakpoints in the system prompt, at the end of the
    message before last, and at the end."""
    session = agent_session(0, turns=turns + 1, tools=4, rules=8)
    body = marked(session.body(turns))
    body["messages"][-3]["content"][-1]["cache_control"] = {"type": "ephemeral", "scope": "org"}
    return {"model": "demo", **to_chat(body)}


async def front_end(model: Path, max_tokens: int) -> Any:
    """Return the state of an API server of ``model``, without an engine behind it."""
    options = [
        *("--model", str(model), "--max-model-len", str(max_tokens), "--enforce-eager"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    parser = make_arg_parser(FlexibleArgumentParser())
    args: Namespace = parser.parse_args(options)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    state: Any = SimpleNamespace()
    await init_render_app_state(config, state, args)
    return state


class Counted:
    """Counts the characters that a renderer tokenises."""

    def __init__(self, renderer: Any) -> None:
        self.characters = 0
        self._tokenize = renderer.tokenize_prompts_async
        renderer.tokenize_prompts_async = self._counting

    async def _counting(self, prompts: Any, params: Any) -> Any:
        self.characters += sum(len(prompt.get("prompt", "")) for prompt in prompts)
        return await self._tokenize(prompts, params)


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the milliseconds that the block takes."""
    start = time.perf_counter()
    yield
    into.append(1000 * (time.perf_counter() - start))


async def measure(result: Result, pairs: int) -> None:
    """Add figures for every history."""
    with tempfile.TemporaryDirectory(prefix="cachescope-") as scratch:
        size = replace(SMALL, max_positions=262_144)
        state = await front_end(build(Path(scratch) / "model", size), size.max_positions)
    renderer = state.online_renderer
    counted = Counted(renderer.renderer)
    readers: list[Caller | None] = [None]
    boundaries = Boundaries(state, lambda: readers[0], token_bytes=TOKEN_BYTES)

    async def render(body: dict[str, Any], session: str | None = None) -> Any:
        """Render and tokenise the prompt of a body; in a session it may go on from another."""
        request = ChatCompletionRequest.model_validate(body)
        readers[0] = None if session is None else Caller("acme", session)
        _, (prompt,) = await renderer.render_chat(request)
        return prompt

    # The first ones that go on from another are tokenised as a whole as well.
    for _ in range(FIRST_CHECKS + 1):
        await render(strip(body_of(1)), "checks")
    for name, turns in HISTORIES.items():
        body = body_of(turns)
        request = READERS[Protocol.CHAT](body, (300, 3600), 300)
        plan = segments(request, _DEFAULTS)
        stripped = strip(body)
        whole: list[float] = []
        finding: list[float] = []
        again: list[float] = []
        going_on: list[float] = []
        # The first round meets a new system prompt, and counts only as that.
        for number in range(pairs + 1):
            await render(strip(body_of(turns - 1)), f"{name}, {number}")
            with timed(going_on):
                gone_on = await render(stripped, f"{name}, {number}")
            with timed(whole):
                prompt = await render(stripped)
            counted.characters = 0
            with timed(finding):
                ends = await boundaries.ends(
                    await boundaries.prefixes(request, stripped, plan, Caller("acme")),
                    Protocol.CHAT,
                    prompt["prompt_token_ids"],
                    prompt["prompt"],
                )
            again.append(100 * counted.characters / len(prompt["prompt"]))
        assert gone_on["prompt_token_ids"] == prompt["prompt_token_ids"]
        assert 0 < ends[0] < ends[-2] < ends[-1] == len(prompt["prompt_token_ids"])
        result.add(f"{name}: tokens", [ends[-1]], "tokens")
        result.add(f"{name}: rendering and tokenising", whole[1:], "ms")
        result.add(f"{name}: the same, where the turn before is known", going_on[1:], "ms")
        result.add(f"{name}: finding its {len(ends) - 1} boundaries", finding[1:], "ms")
        result.add(f"{name}: the same, new system prompt", finding[:1], "ms")
        result.add(
            f"{name}: text tokenised a second time",
            again[1:],
            "%",
            "at most 10 %",
            lambda share: share <= 10,
        )
        result.add(
            f"{name}: finding over rendering and tokenising",
            [a / b for a, b in zip(finding[1:], whole[1:], strict=True)],
            "×",
        )


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("boundaries", options.quick)
    asyncio.run(measure(result, options.pairs))
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
